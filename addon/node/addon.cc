// The module: NativeAddon of server/engine/addon.ts.
#include <napi.h>

#include <exception>
#include <string>
#include <vector>

#include "backend.h"
#include "engine/runner.h"
#include "node/convert.h"
#include "node/runner_object.h"

namespace rodin::node {
namespace {

struct InstanceData {
  Napi::FunctionReference runner_class;
};

// Runs f; what it throws becomes a JavaScript error.
template <class F>
auto guarded(Napi::Env env, F&& f) {
  try {
    return f();
  } catch (const Napi::Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Napi::Error::New(env, error.what());
  }
}

Napi::Array to_string_array(Napi::Env env, const std::vector<std::string>& values) {
  Napi::Array array = Napi::Array::New(env, values.size());
  for (uint32_t i = 0; i < values.size(); ++i) array.Set(i, values[i]);
  return array;
}

Napi::Value create_runner(const Napi::CallbackInfo& info) {
  return info.Env().GetInstanceData<InstanceData>()->runner_class.New({info[0]});
}

Napi::Value get_cache_bytes_per_token(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const CacheOptions options = to_cache_options(info[0]);
    const int64_t bytes = cache_bytes_per_token(options.spec, options.compute, options.device,
                                                options.kv_cache_dtype, options.load_mtp);
    return Napi::Number::New(info.Env(), static_cast<double>(bytes));
  });
}

Napi::Value get_devices(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const DeviceList devices = list_devices();
    Napi::Array unusable = Napi::Array::New(env, devices.unusable.size());
    for (uint32_t i = 0; i < devices.unusable.size(); ++i) {
      Napi::Object entry = Napi::Object::New(env);
      entry.Set("device", devices.unusable[i].first);
      entry.Set("reason", devices.unusable[i].second);
      unusable.Set(i, entry);
    }
    Napi::Object object = Napi::Object::New(env);
    object.Set("usable", to_string_array(env, devices.usable));
    object.Set("unusable", unusable);
    return object;
  });
}

Napi::Value get_ceilings(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Ceilings ceilings = make_ops(to_backend_options(info[0]))->measure_ceilings();
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("readBytesPerSecond", ceilings.read_bytes_per_second);
    object.Set("flopsPerSecond", ceilings.flops_per_second);
    return object;
  });
}

Napi::Value get_op_timing(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return from_op_timing(info.Env(), time_op(to_backend_options(info[0]), to_op_case(info[0])));
  });
}

Napi::Value get_cpu_paths(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value { return to_string_array(info.Env(), cpu_paths()); });
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* data = new InstanceData{Napi::Persistent(RunnerObject::define(env))};
  env.SetInstanceData(data);
  exports.Set("createRunner", Napi::Function::New(env, create_runner, "createRunner"));
  exports.Set("cacheBytesPerToken",
              Napi::Function::New(env, get_cache_bytes_per_token, "cacheBytesPerToken"));
  exports.Set("devices", Napi::Function::New(env, get_devices, "devices"));
  exports.Set("cpuPaths", Napi::Function::New(env, get_cpu_paths, "cpuPaths"));
  exports.Set("timeOp", Napi::Function::New(env, get_op_timing, "timeOp"));
  exports.Set("ceilings", Napi::Function::New(env, get_ceilings, "ceilings"));
  return exports;
}

}  // namespace

NODE_API_MODULE(rodin, init)

}  // namespace rodin::node
