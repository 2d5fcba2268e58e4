#include "node/runner_object.h"

#include <chrono>
#include <exception>
#include <new>
#include <string>
#include <utility>

#include "node/convert.h"

namespace rodin::node {
namespace {

// How long the end of the process waits for a step or a load that is under way.
constexpr std::chrono::milliseconds kPatience{1000};

Napi::Value rejected(Napi::Env env, const std::string& message) {
  const auto deferred = Napi::Promise::Deferred::New(env);
  deferred.Reject(Napi::Error::New(env, message).Value());
  return deferred.Promise();
}

}  // namespace

void EventChannel::send(EngineEvent event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (function_ == nullptr) return;
  auto* data = new EngineEvent(std::move(event));
  if (napi_call_threadsafe_function(function_, data, napi_tsfn_nonblocking) != napi_ok) delete data;
}

void EventChannel::open(Napi::Env env, napi_threadsafe_function_call_js on_event, void* context) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const napi_status status =
      napi_create_threadsafe_function(env, nullptr, nullptr, Napi::String::New(env, "rodin-engine"), 0, 1,
                                      nullptr, nullptr, context, on_event, &function_);
  if (status != napi_ok)
    throw Napi::Error::New(env, "cannot make a thread-safe function for the engine thread");
}

void EventChannel::keep_alive(Napi::Env env, bool is_needed) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (function_ == nullptr) return;
  if (is_needed) {
    napi_ref_threadsafe_function(env, function_);
  } else {
    napi_unref_threadsafe_function(env, function_);
  }
}

void EventChannel::cut(bool is_released) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (function_ != nullptr && is_released) napi_release_threadsafe_function(function_, napi_tsfn_abort);
  function_ = nullptr;
}

Napi::Function RunnerObject::define(Napi::Env env) {
  return DefineClass(
      env, "NativeRunner",
      {InstanceMethod<&RunnerObject::load>("load"), InstanceMethod<&RunnerObject::progress>("progress"),
       InstanceMethod<&RunnerObject::step>("step"), InstanceMethod<&RunnerObject::close>("close")});
}

RunnerObject::RunnerObject(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<RunnerObject>(info), env_(info.Env()), channel_(std::make_shared<EventChannel>()) {
  try {
    engine_ = std::make_unique<EngineThread>(
        to_runner_options(info[0]),
        [channel = channel_](EngineEvent event) { channel->send(std::move(event)); });
  } catch (const Napi::Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Napi::Error::New(env_, error.what());
  }
  total_bytes_ = engine_->total_bytes();
  channel_->open(env_, on_event, this);
  channel_->keep_alive(env_, false);
  // Registered after the thread-safe function, so that it runs before that one's own clean-up.
  napi_add_env_cleanup_hook(env_, on_environment_end, this);
}

RunnerObject::~RunnerObject() {
  if (engine_ == nullptr) return;
  napi_remove_env_cleanup_hook(env_, on_environment_end, this);
  abandon(true);
}

void RunnerObject::on_environment_end(void* self) { static_cast<RunnerObject*>(self)->abandon(false); }

void RunnerObject::abandon(bool is_environment_alive) {
  channel_->cut(is_environment_alive);
  engine_->join_or_leave(kPatience);
  engine_.reset();
}

void RunnerObject::begin_call(Napi::Env env) {
  if (num_pending_++ > 0) return;
  Ref();
  channel_->keep_alive(env, true);
}

void RunnerObject::end_call(Napi::Env env) {
  if (--num_pending_ > 0) return;
  channel_->keep_alive(env, false);
  Unref();
}

Napi::Value RunnerObject::load(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (is_closing_) return rejected(env, "the runner is closed");
  if (std::exchange(is_load_called_, true)) return rejected(env, "load() was called already");
  loading_ = Napi::Promise::Deferred::New(env);
  begin_call(env);
  engine_->load();
  return loading_->Promise();
}

Napi::Value RunnerObject::progress(const Napi::CallbackInfo& info) {
  if (engine_ != nullptr) loaded_bytes_ = engine_->loaded_bytes();
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("loadedBytes", static_cast<double>(loaded_bytes_));
  object.Set("totalBytes", static_cast<double>(total_bytes_));
  return object;
}

Napi::Value RunnerObject::step(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (is_closing_) return rejected(env, "the runner is closed");
  if (stepping_.size() >= Runner::kMaxBegun) {
    return rejected(env, "two steps are running: wait for the first one's promise before the next step()");
  }
  try {
    StepBatch batch = to_step_batch(info[0]);
    // Reading the batch may have run JavaScript (a getter), which may have called this object.
    if (is_closing_ || stepping_.size() >= Runner::kMaxBegun) {
      return rejected(env, "the runner was used while its batch was read");
    }
    stepping_.push_back(Napi::Promise::Deferred::New(env));
    begin_call(env);
    engine_->step(std::move(batch));
    return stepping_.back().Promise();
  } catch (const Napi::Error& error) {
    const auto deferred = Napi::Promise::Deferred::New(env);
    deferred.Reject(error.Value());
    return deferred.Promise();
  } catch (const std::bad_alloc&) {
    return rejected(env, "out of memory while copying the batch");
  }
}

Napi::Value RunnerObject::close(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto deferred = Napi::Promise::Deferred::New(env);
  if (engine_ == nullptr) {
    deferred.Resolve(env.Undefined());
    return deferred.Promise();
  }
  closing_.push_back(deferred);
  if (!std::exchange(is_closing_, true)) {
    begin_call(env);
    engine_->close();
  }
  return deferred.Promise();
}

void RunnerObject::on_event(napi_env env, napi_value, void* context, void* data) {
  const std::unique_ptr<EngineEvent> event(static_cast<EngineEvent*>(data));
  if (env == nullptr) return;  // the queue is being thrown away; the context may be gone
  static_cast<RunnerObject*>(context)->settle(env, *event);
}

void RunnerObject::settle(Napi::Env env, const EngineEvent& event) {
  if (event.kind == EngineEvent::Kind::kClosed) {
    napi_remove_env_cleanup_hook(env_, on_environment_end, this);
    loaded_bytes_ = engine_->loaded_bytes();
    engine_.reset();
    for (const auto& deferred : std::exchange(closing_, {})) deferred.Resolve(env.Undefined());
    end_call(env);
    channel_->cut(true);
    return;
  }
  const bool is_loaded = event.kind == EngineEvent::Kind::kLoaded;
  const Napi::Promise::Deferred deferred = is_loaded ? *loading_ : stepping_.front();
  if (is_loaded) {
    loading_.reset();
  } else {
    stepping_.pop_front();
  }
  try {
    if (!event.error.empty()) {
      const Napi::Error error = Napi::Error::New(env, event.error);
      if (event.is_device_lost) error.Set("code", Napi::String::New(env, "DEVICE_LOST"));
      deferred.Reject(error.Value());
    } else if (is_loaded) {
      deferred.Resolve(from_runner_info(env, event.info));
    } else {
      deferred.Resolve(from_step_result(env, event.result));
    }
  } catch (const Napi::Error& error) {
    deferred.Reject(error.Value());  // no memory for the arrays
  }
  end_call(env);
}

}  // namespace rodin::node
