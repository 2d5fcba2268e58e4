// NativeRunner of server/engine/addon.ts: promises in front of one EngineThread. Events come back through one
// thread-safe function, which keeps the event loop alive only while a promise is pending.
#pragma once

#include <napi.h>

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "engine/engine_thread.h"

namespace rodin::node {

// The way from the engine thread to the event loop. It can be cut at any moment (the environment ends, the
// object is collected); events sent after that are dropped.
class EventChannel {
 public:
  // Any thread.
  void send(EngineEvent event);
  // The event loop's thread from here on.
  void open(Napi::Env env, napi_threadsafe_function_call_js on_event, void* context);
  void keep_alive(Napi::Env env, bool is_needed);
  // Cuts the channel; `is_released` is false where the environment is ending and frees the function itself.
  void cut(bool is_released);

 private:
  std::mutex mutex_;
  napi_threadsafe_function function_ = nullptr;  // guarded by mutex_; null when cut
};

class RunnerObject : public Napi::ObjectWrap<RunnerObject> {
 public:
  static Napi::Function define(Napi::Env env);

  explicit RunnerObject(const Napi::CallbackInfo& info);
  ~RunnerObject() override;

 private:
  Napi::Value load(const Napi::CallbackInfo& info);
  Napi::Value progress(const Napi::CallbackInfo& info);
  Napi::Value step(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  static void on_event(napi_env env, napi_value function, void* context, void* data);
  static void on_environment_end(void* self);
  void settle(Napi::Env env, const EngineEvent& event);
  // While a promise is pending the event loop stays alive and this object is not collected.
  void begin_call(Napi::Env env);
  void end_call(Napi::Env env);
  // Cuts the channel and waits a little for the engine thread.
  void abandon(bool is_environment_alive);

  napi_env const env_;
  std::shared_ptr<EventChannel> channel_;  // shared with the engine thread
  std::unique_ptr<EngineThread> engine_;   // null once closed
  bool is_closing_ = false;
  bool is_load_called_ = false;
  int num_pending_ = 0;
  int64_t loaded_bytes_ = 0;  // what progress() says once closed
  int64_t total_bytes_ = 0;
  std::optional<Napi::Promise::Deferred> loading_;
  std::deque<Napi::Promise::Deferred> stepping_;  // at most Runner::kMaxBegun, in order
  std::vector<Napi::Promise::Deferred> closing_;
};

}  // namespace rodin::node
