#include "engine/engine_thread.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "tests/native/test.h"

namespace rodin {
namespace {

// Collects events; wait_for(n) returns when n have come.
struct EventLog {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<EngineEvent> events;

  EngineThread::OnEvent listener() {
    return [this](EngineEvent event) {
      const std::lock_guard<std::mutex> lock(mutex);
      events.push_back(std::move(event));
      changed.notify_all();
    };
  }
  bool wait_for(size_t count) {
    std::unique_lock<std::mutex> lock(mutex);
    return changed.wait_for(lock, std::chrono::seconds(10), [&] { return events.size() >= count; });
  }
};

// A model whose only tensor lies in a file that does not exist.
RunnerOptions missing_model() {
  RunnerOptions options;
  options.spec.model_type = "deepseek_v3";
  options.spec.vocab_size = 16;
  options.spec.hidden_size = 8;
  options.spec.num_hidden_layers = 1;
  options.spec.max_position_embeddings = 64;
  options.tensors.push_back(
      {"model.embed_tokens.weight", "F32", {16, 8}, "/nonexistent/model.safetensors", 8, 512});
  options.block_size = 4;
  options.num_blocks = 4;
  options.max_step_tokens = 8;
  options.max_num_seqs = 2;
  return options;
}

TEST("engine thread: a failed load, a step without a model and the end come back as events, in order") {
  EventLog log;
  EngineThread engine(missing_model(), log.listener());
  engine.load();
  engine.step(StepBatch{});
  engine.close();
  CHECK(log.wait_for(3));
  CHECK(log.events[0].kind == EngineEvent::Kind::kLoaded);
  CHECK(!log.events[0].error.empty());
  CHECK(log.events[1].kind == EngineEvent::Kind::kStepped);
  CHECK_EQ(log.events[1].error, "the model is not loaded: call load() and wait for it before step()");
  CHECK(log.events[2].kind == EngineEvent::Kind::kClosed);
  CHECK_EQ(log.events[2].error, "");
  CHECK(engine.join_or_leave(std::chrono::seconds(10)));
  CHECK_EQ(log.events.size(), size_t{3});
}

TEST("engine thread: destruction without a call or a close ends the thread") {
  EventLog log;
  for (int i = 0; i < 50; ++i) EngineThread engine(missing_model(), log.listener());
  CHECK_EQ(log.events.size(), size_t{50});
}

TEST("engine thread: options out of range are refused before a thread starts") {
  EventLog log;
  RunnerOptions options = missing_model();
  options.num_threads = 0;
  CHECK_THROWS(EngineThread(options, log.listener()), "numThreads is 0");
  CHECK(log.events.empty());
}

}  // namespace
}  // namespace rodin
