#include "engine/engine_thread.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "engine/validate.h"
#include "ops/check.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace rodin {
namespace {

using Clock = std::chrono::steady_clock;

// How long the thread stays awake for the next call, leaving its core to whoever wants it: between two steps
// the scheduler runs for tens to hundreds of microseconds, and waking a sleeper costs the caller tens.
constexpr std::chrono::microseconds kAwakeTime{300};

// Keeps the calling thread on the CPU it is on, where CPUs are left over: pinning on a machine that the
// compute threads fill leaves the scheduler no way round a CPU that somebody else uses. Threads started later
// inherit the mask, so this comes after the pool has started.
void pin_to_current_cpu([[maybe_unused]] int64_t num_threads) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) <= num_threads) return;
  const int cpu = sched_getcpu();
  if (cpu < 0) return;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  sched_setaffinity(0, sizeof one, &one);
#endif
}

}  // namespace

struct EngineThread::State {
  struct Call {
    EngineEvent::Kind kind;
    StepBatch batch;  // of kStepped
  };

  struct Step {
    EngineEvent event;  // with the error of one that could not be begun
    Clock::time_point start;
  };

  State(RunnerOptions given, OnEvent on_event)
      : options(without_tensors(given)),
        runner(std::in_place, std::move(given)),
        on_event(std::move(on_event)) {
    total_bytes = runner->total_bytes();
  }

  // The Runner keeps the table of tensors; a batch is checked against the rest.
  static RunnerOptions without_tensors(RunnerOptions& given) {
    std::vector<TensorEntry> tensors = std::exchange(given.tensors, {});
    RunnerOptions rest = given;
    given.tensors = std::move(tensors);
    return rest;
  }

  void post(Call call) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      calls.push_back(std::move(call));
      num_calls.store(static_cast<int>(calls.size()), std::memory_order_release);
    }
    changed.notify_all();  // makes no system call while nobody sleeps
  }

  Call next_call() {
    const auto end = Clock::now() + kAwakeTime;
    while (num_calls.load(std::memory_order_acquire) == 0 && Clock::now() < end) {
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return !calls.empty(); });
    Call call = std::move(calls.front());
    calls.pop_front();
    num_calls.store(static_cast<int>(calls.size()), std::memory_order_relaxed);
    return call;
  }

  // Does what a call asks for; a step is begun, and its event completed by finish_step().
  void run_call(const Call& call, EngineEvent& event) {
    switch (call.kind) {
      case EngineEvent::Kind::kLoaded:
        check(!is_loaded, "the model has been loaded already");
        event.info = runner->load(loaded_bytes);
        options.num_blocks = event.info.num_blocks;
        is_loaded = true;
        pin_to_current_cpu(options.num_threads);
        break;
      case EngineEvent::Kind::kStepped:
        check(is_loaded, "the model is not loaded: call load() and wait for it before step()");
        validate_batch(call.batch, options, std::exchange(num_rows_before, 0));
        runner->begin(call.batch);
        num_rows_before = call.batch.num_sampled_rows();
        break;
      case EngineEvent::Kind::kClosed:
        is_loaded = false;
        runner.reset();
        break;
    }
  }

  // The only place where an exception becomes a message.
  template <class F>
  static void guarded(EngineEvent& event, F&& f) {
    try {
      f();
    } catch (const DeviceLost& error) {
      event.error = error.what();
      event.is_device_lost = true;
    } catch (const std::bad_alloc&) {
      event.error = "out of memory";
    } catch (const std::exception& error) {
      event.error = *error.what() != '\0' ? error.what() : "unknown error";
    } catch (...) {
      event.error = "unknown error";
    }
  }

  // Of the oldest step begun.
  void finish_step() {
    EngineEvent event = std::move(steps.front().event);
    if (event.error.empty()) guarded(event, [&] { runner->finish(event.result); });
    const auto now = Clock::now();
    const std::chrono::duration<double, std::micro> elapsed =
        now - std::max(steps.front().start, last_finish);
    event.result.step_micros = elapsed.count();
    last_finish = now;
    steps.pop_front();
    on_event(std::move(event));
  }

  // Whether the oldest step's event is there, or another step may not be begun before it.
  bool must_finish() {
    if (steps.empty()) return false;
    if (steps.size() == Runner::kMaxBegun || !steps.front().event.error.empty()) return true;
    bool is_done = true;
    EngineEvent ignored;  // what fails here fails again in finish()
    guarded(ignored, [&] { is_done = runner->is_done(); });
    return is_done;
  }

  void run() {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "rodin-engine");
#endif
    bool is_closed = false;
    while (!is_closed) {
      if (must_finish()) {
        finish_step();
        continue;
      }
      if (!steps.empty() && num_calls.load(std::memory_order_acquire) == 0) {
        std::this_thread::yield();
        continue;
      }
      const Call call = next_call();
      const auto start = Clock::now();
      EngineEvent event;
      event.kind = call.kind;
      if (call.kind == EngineEvent::Kind::kStepped) {
        guarded(event, [&] { run_call(call, event); });
        steps.push_back({std::move(event), start});
        continue;
      }
      while (!steps.empty()) finish_step();
      guarded(event, [&] { run_call(call, event); });
      is_closed = call.kind == EngineEvent::Kind::kClosed;
      on_event(std::move(event));
    }
    std::lock_guard<std::mutex> lock(mutex);
    has_ended = true;
    changed.notify_all();
  }

  RunnerOptions options;          // engine thread only: load() says how many blocks there are
  std::optional<Runner> runner;   // engine thread only, once it runs
  bool is_loaded = false;         // engine thread only
  std::deque<Step> steps;         // engine thread only; begun and not finished, at most Runner::kMaxBegun
  Clock::time_point last_finish;  // engine thread only
  int64_t num_rows_before = 0;    // engine thread only; sampled by the step begun last, 0 where it failed
  const OnEvent on_event;
  std::atomic<int64_t> loaded_bytes{0};
  int64_t total_bytes = 0;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Call> calls;         // guarded by mutex
  std::atomic<int> num_calls{0};  // their number, for a look without the lock
  bool has_ended = false;         // guarded by mutex
  bool is_close_posted = false;   // caller's side only
  std::thread thread;             // caller's side only
};

EngineThread::EngineThread(RunnerOptions options, OnEvent on_event) {
  validate_options(options);
  state_ = std::make_shared<State>(std::move(options), std::move(on_event));
  state_->thread = std::thread([state = state_] { state->run(); });
}

EngineThread::~EngineThread() {
  close();
  if (state_->thread.joinable()) state_->thread.join();
}

void EngineThread::load() { state_->post({EngineEvent::Kind::kLoaded, {}}); }

void EngineThread::step(StepBatch batch) { state_->post({EngineEvent::Kind::kStepped, std::move(batch)}); }

void EngineThread::close() {
  if (std::exchange(state_->is_close_posted, true)) return;
  state_->post({EngineEvent::Kind::kClosed, {}});
}

bool EngineThread::join_or_leave(std::chrono::milliseconds patience) {
  close();
  if (!state_->thread.joinable()) return true;
  bool has_ended;
  {
    std::unique_lock<std::mutex> lock(state_->mutex);
    has_ended = state_->changed.wait_for(lock, patience, [&] { return state_->has_ended; });
  }
  if (has_ended) {
    state_->thread.join();
  } else {
    state_->thread.detach();
  }
  return has_ended;
}

int64_t EngineThread::loaded_bytes() const { return state_->loaded_bytes.load(std::memory_order_relaxed); }

int64_t EngineThread::total_bytes() const { return state_->total_bytes; }

}  // namespace rodin
