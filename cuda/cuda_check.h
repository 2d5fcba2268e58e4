// Every CUDA call goes through RODIN_CUDA: a failure becomes one std::runtime_error that names call and
// place, a DeviceLost where no later call can succeed.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/check.h"

namespace rodin::cuda {

// After these the context is lost: every later call fails too, and only a new process helps.
inline bool is_sticky(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
      return true;
    default:
      return false;
  }
}

template <class... Parts>
void check_cuda(cudaError_t error, const char* call, const char* file, int line, const Parts&... parts) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears an error that is not sticky
  std::ostringstream message;
  message << "CUDA: " << cudaGetErrorName(error) << " (" << cudaGetErrorString(error) << ") from " << call
          << " at " << file << ":" << line;
  ((message << parts), ...);
  if (is_sticky(error)) throw DeviceLost(message.str() + "; the GPU context is lost");
  fail(message.str());
}

}  // namespace rodin::cuda

// RODIN_CUDA(cudaMemcpyAsync(...), " of ", bytes, " bytes")
#define RODIN_CUDA(call, ...) \
  ::rodin::cuda::check_cuda((call), #call, __FILE__, __LINE__ __VA_OPT__(, ) __VA_ARGS__)
