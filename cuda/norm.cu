// RMS norm: out = x * rsqrt(mean(x^2) + eps) * weight, and the form that first adds `delta` to the float32
// residual. One block of 256 threads a row, each thread the same elements throughout (so that out may be x);
// the sum's order depends on the row's length and strides alone. Rows of up to 8192 whose parts are aligned
// stay in registers between the two passes. Bound by latency for few rows, by bytes for many: x (and delta)
// in, out out.
#include "cuda/common.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostWords = 8;  // words of four elements that a thread keeps

template <class X>
__device__ __forceinline__ float to_float(X x) {
  if constexpr (sizeof(X) == 2) return __bfloat162float(x);
  return x;
}

template <class X>
__device__ __forceinline__ float4 load_four(const X* from) {
  if constexpr (sizeof(X) == 4) {
    return *reinterpret_cast<const float4*>(from);
  } else {
    const uint2 pairs = *reinterpret_cast<const uint2*>(from);
    return {low_float(pairs.x), high_float(pairs.x), low_float(pairs.y), high_float(pairs.y)};
  }
}

__device__ __forceinline__ float inverse_rms(float sum, const NormParams& p) {
  return 1.0f / sqrtf(sum / static_cast<float>(p.cols) + p.eps);
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
  const auto at = [](int i) { return (i * kThreads + static_cast<int>(threadIdx.x)) * 4; };
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
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (at(i) >= p.cols) break;
      value[i].x += added[i].x, value[i].y += added[i].y, value[i].z += added[i].z, value[i].w += added[i].w;
      *reinterpret_cast<float4*>(x + at(i)) = value[i];
    }
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (at(i) >= p.cols) break;
    const float4 v = value[i];
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  const float inverse = inverse_rms(block_sum<kThreads>(sum, scratch), p);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (at(i) >= p.cols) break;
    const float4 v = value[i], w = weight[i];
    *reinterpret_cast<uint2*>(out + at(i)) = make_uint2(pack_bf16(v.x * inverse * w.x, v.y * inverse * w.y),
                                                        pack_bf16(v.z * inverse * w.z, v.w * inverse * w.w));
  }
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
  const float inverse = inverse_rms(block_sum<kThreads>(sum, scratch), p);
  for (int i = threadIdx.x; i < p.cols; i += kThreads) {
    out[i] = __float2bfloat16_rn(to_float(x[i]) * inverse * p.weight[i]);
  }
}

template <class X, bool kAdd>
void launch(const NormParams& p, bool is_aligned, cudaStream_t stream) {
  const int64_t words = ceil_div(p.cols, 4 * kThreads);
  const auto kernel = !is_aligned || words > kMostWords ? rms_norm_any_kernel<X, kAdd>
                      : words <= 1                      ? rms_norm_kernel<X, kAdd, 1>
                      : words <= 2                      ? rms_norm_kernel<X, kAdd, 2>
                                                        : rms_norm_kernel<X, kAdd, kMostWords>;
  launch_overlapped(kernel, dim3(static_cast<unsigned>(p.num_rows)), kThreads, 0, stream, p,
                    "rms_norm_kernel");
}

}  // namespace

void run_rms_norm(const NormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const auto address = [](const void* data) { return reinterpret_cast<int64_t>(data); };
  const int64_t bytes = params.x_dtype == Dtype::kF32 ? 4 : 2;
  const bool is_aligned = params.cols % 4 == 0 && address(params.weight) % 16 == 0 &&
                          (address(params.x) | params.x_stride * bytes) % (4 * bytes) == 0 &&
                          (address(params.out) | params.out_stride * 2) % 8 == 0 &&
                          (address(params.delta) | params.delta_stride * 2) % 8 == 0;
  if (params.delta) {
    launch<float, true>(params, is_aligned, stream);
  } else if (params.x_dtype == Dtype::kF32) {
    launch<float, false>(params, is_aligned, stream);
  } else {
    launch<bf16, false>(params, is_aligned, stream);
  }
}

}  // namespace rodin::cuda
