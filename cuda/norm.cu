// RMS norm: out = x * rsqrt(mean(x^2) + eps) * weight, and the form that first adds `delta` to the float32
// residual. One block of 256 threads a row, each thread the same elements in both passes (so that out may be
// x); the sum's order depends on the row's length alone. Bound by bytes: x (and delta) in, out out.
#include "cuda/common.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 256;

template <class X>
__device__ __forceinline__ float to_float(X x) {
  if constexpr (sizeof(X) == 2) return __bfloat162float(x);
  return x;
}

template <class X, bool kAdd>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const __grid_constant__ NormParams p) {
  __shared__ float scratch[kThreads / 32];  // [kThreads / 32]
  const int64_t row = blockIdx.x;
  X* x = static_cast<X*>(const_cast<void*>(p.x)) + row * p.x_stride;
  bf16* out = static_cast<bf16*>(p.out) + row * p.out_stride;
  float sum = 0;
  for (int i = threadIdx.x; i < p.cols; i += kThreads) {
    float value = to_float(x[i]);
    if constexpr (kAdd) {
      value += __bfloat162float(static_cast<const bf16*>(p.delta)[row * p.delta_stride + i]);
      x[i] = value;
    }
    sum += value * value;
  }
  sum = block_sum<kThreads>(sum, scratch);
  const float inverse = 1.0f / sqrtf(sum / static_cast<float>(p.cols) + p.eps);
  for (int i = threadIdx.x; i < p.cols; i += kThreads) {
    out[i] = __float2bfloat16_rn(to_float(x[i]) * inverse * p.weight[i]);
  }
}

}  // namespace

void run_rms_norm(const NormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const auto grid = static_cast<unsigned>(params.num_rows);
  if (params.delta) {
    rms_norm_kernel<float, true><<<grid, kThreads, 0, stream>>>(params);
  } else if (params.x_dtype == Dtype::kF32) {
    rms_norm_kernel<float, false><<<grid, kThreads, 0, stream>>>(params);
  } else {
    rms_norm_kernel<bf16, false><<<grid, kThreads, 0, stream>>>(params);
  }
  RODIN_CHECK_LAUNCH("rms_norm_kernel");
}

}  // namespace rodin::cuda
