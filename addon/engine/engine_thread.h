// The one native thread that owns a Runner: it loads, steps and destroys it, in the order of the calls. A
// step that the device is left running with does not keep the next one from being begun.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "engine/runner.h"
#include "engine/step.h"

namespace rodin {

// What became of one call.
struct EngineEvent {
  enum class Kind { kLoaded, kStepped, kClosed };
  Kind kind = Kind::kClosed;
  std::string error;            // empty on success
  bool is_device_lost = false;  // with error: no later call can succeed
  RunnerInfo info;              // of kLoaded
  StepResult result;            // of kStepped
};

class EngineThread {
 public:
  // Called on the engine thread, once for each call below; must not throw.
  using OnEvent = std::function<void(EngineEvent)>;

  // Throws where the options are out of range or no thread can be started.
  EngineThread(RunnerOptions options, OnEvent on_event);
  // Finishes the calls made so far, destroys the Runner and joins.
  ~EngineThread();
  EngineThread(const EngineThread&) = delete;
  EngineThread& operator=(const EngineThread&) = delete;

  void load();
  void step(StepBatch batch);
  // The last event is kClosed; calls after this one are not allowed.
  void close();

  // Waits that long for the thread to end after close(); false where it has not. The thread is then left to
  // itself: it finishes what it does, and its events go on to on_event.
  bool join_or_leave(std::chrono::milliseconds patience);

  int64_t loaded_bytes() const;
  int64_t total_bytes() const;

 private:
  struct State;
  std::shared_ptr<State> state_;  // shared with the thread, which may outlive this object
};

}  // namespace rodin
