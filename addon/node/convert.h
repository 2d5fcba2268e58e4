// JavaScript values to plain C++ structs and back. Every property is checked for its exact type; a wrong one
// throws Napi::TypeError with one sentence that names it.
#pragma once

#include <napi.h>

#include "backend.h"
#include "engine/op_bench.h"
#include "engine/runner.h"
#include "engine/step.h"

namespace rodin::node {

ModelSpec to_model_spec(const Napi::Value& value);
RunnerOptions to_runner_options(const Napi::Value& value);

// The arguments of cacheBytesPerToken, a part of RunnerOptions.
struct CacheOptions {
  ModelSpec spec;
  std::string compute;
  std::string device;
  std::string kv_cache_dtype;
  bool load_mtp = false;
};
CacheOptions to_cache_options(const Napi::Value& value);

// The arguments of ceilings, a part of RunnerOptions.
BackendOptions to_backend_options(const Napi::Value& value);

// The arguments of timeOp, beside those of ceilings.
OpCase to_op_case(const Napi::Value& value);

// Copies every array.
StepBatch to_step_batch(const Napi::Value& value);

Napi::Object from_op_timing(Napi::Env env, const OpTiming& timing);
Napi::Object from_runner_info(Napi::Env env, const RunnerInfo& info);
Napi::Object from_step_result(Napi::Env env, const StepResult& result);

}  // namespace rodin::node
