// A module for tests that loses this process's GPU context: fault() runs a kernel that writes to an address
// which is none. What the engine's own calls do from then on is what they do after any such error.
#include <cuda_runtime_api.h>
#include <node_api.h>

namespace {

__global__ void write_nowhere(int* to) { *to = 1; }

napi_value fault(napi_env env, napi_callback_info) {
  write_nowhere<<<1, 1>>>(reinterpret_cast<int*>(16));
  const cudaError_t error = cudaDeviceSynchronize();
  napi_value name;
  napi_create_string_utf8(env, cudaGetErrorName(error), NAPI_AUTO_LENGTH, &name);
  return name;
}

}  // namespace

NAPI_MODULE_INIT() {
  napi_value function;
  napi_create_function(env, "fault", NAPI_AUTO_LENGTH, fault, nullptr, &function);
  napi_set_named_property(env, exports, "fault", function);
  return exports;
}
