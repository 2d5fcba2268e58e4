// RMS norm: out = x * rsqrt(mean(x^2) + eps) * weight, and the form that first adds `delta` to the float32
// residual. One block of 256 threads a row, each thread the same elements throughout (so that out may be x);
// the sum's order depends on the row's length and strides alone. Rows of up to 8192 whose parts are aligned
// stay in registers between the two passes. Bound by latency for few rows, by bytes for many: x (and delta)
// in, out out.
#include "cuda/norm.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = kNormThreads;

template <class X>
__device__ __forceinline__ float to_float(X x) {
  if constexpr (sizeof(X) == 2) return __bfloat162float(x);
  return x;
}

// kWords: words of a thread, the last one perhaps behind the row's end.
template <class X, bool kAdd, int kWords>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const __grid_constant__ NormParams p) {
  let_successor_begin();
  __shared__ float scratch[kThreads / 32];  // [kThreads / 32]
  const int64_t row = blockIdx.x;
  X* x = static_cast<X*>(const_cast<void*>(p.x)) + row * p.x_stride;
  const bf16* delta = static_cast<const bf16*>(p.delta) + (kAdd ? row * p.delta_stride : 0);
  bf16* out = static_cast<bf16*>(p.out) + row * p.out_stride;
  const auto at = norm_column;
  float4 weight[kWords], value[kWords];  // [kWords]
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (at(i) < p.cols) weight[i] = load_four(p.weight + at(i));
  }
  wait_for_predecessor();
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (at(i) < p.cols) value[i] = load_four(x + at(i));
  }
  if constexpr (kAdd) {
    float4 added[kWords];  // [kWords]
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (at(i) < p.cols) added[i] = load_four(delta + at(i));
    }
    add_words<kWords>(value, added, p.cols);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (at(i) < p.cols) *reinterpret_cast<float4*>(x + at(i)) = value[i];
    }
  }
  store_normed<kWords>(value, weight, inverse_rms(norm_sum<kWords>(value, p.cols, scratch), p.cols, p.eps),
                       p.cols, out);
}

// Rows of any length at any address.
template <class X, bool kAdd>
__global__ void __launch_bounds__(kThreads) rms_norm_any_kernel(const __grid_constant__ NormParams p) {
  let_successor_begin();
  wait_for_predecessor();
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
  const float inverse = inverse_rms(block_sum<kThreads>(sum, scratch), p.cols, p.eps);
  for (int i = threadIdx.x; i < p.cols; i += kThreads) {
    out[i] = __float2bfloat16_rn(to_float(x[i]) * inverse * p.weight[i]);
  }
}

template <class X, bool kAdd>
void launch(const NormParams& p, bool is_in_registers, cudaStream_t stream) {
  const int64_t words = ceil_div(p.cols, 4 * kThreads);
  const auto kernel = !is_in_registers ? rms_norm_any_kernel<X, kAdd>
                      : words <= 1     ? rms_norm_kernel<X, kAdd, 1>
                      : words <= 2     ? rms_norm_kernel<X, kAdd, 2>
                                       : rms_norm_kernel<X, kAdd, kNormMostWords>;
  launch_overlapped(kernel, dim3(static_cast<unsigned>(p.num_rows)), kThreads, 0, stream, p,
                    "rms_norm_kernel");
}

}  // namespace

bool is_norm_in_registers(const NormParams& p) {
  const auto address = [](const void* data) { return reinterpret_cast<int64_t>(data); };
  const int64_t bytes = p.x_dtype == Dtype::kF32 ? 4 : 2;
  return ceil_div(p.cols, 4 * kThreads) <= kNormMostWords && p.cols % 4 == 0 && address(p.weight) % 16 == 0 &&
         (address(p.x) | p.x_stride * bytes) % (4 * bytes) == 0 &&
         (address(p.out) | p.out_stride * 2) % 8 == 0 && (address(p.delta) | p.delta_stride * 2) % 8 == 0;
}

void run_rms_norm(const NormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const bool is_in_registers = is_norm_in_registers(params);
  if (params.delta) {
    launch<float, true>(params, is_in_registers, stream);
  } else if (params.x_dtype == Dtype::kF32) {
    launch<float, false>(params, is_in_registers, stream);
  } else {
    launch<bf16, false>(params, is_in_registers, stream);
  }
}

}  // namespace rodin::cuda
