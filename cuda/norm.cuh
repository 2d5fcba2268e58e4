// The RMS norm of a row that a block of kNormThreads keeps in registers: a thread has the words i of four
// elements from norm_column(i) on. Every kernel that norms such rows sums in this order.
#pragma once

#include "cuda/common.cuh"

namespace rodin::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormMostWords = 8;  // words of four elements that a thread keeps

__device__ __forceinline__ int norm_column(int i) {
  return (i * kNormThreads + static_cast<int>(threadIdx.x)) * 4;
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

__device__ __forceinline__ float inverse_rms(float sum, int cols, float eps) {
  return 1.0f / sqrtf(sum / static_cast<float>(cols) + eps);
}

// Sum of the row's squares, the same in every thread.
template <int kWords>
__device__ __forceinline__ float norm_sum(const float4 (&value)[kWords], int cols, float* scratch) {
  float sum = 0;  // products and sums are joined as written, so that every kernel does the same
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (norm_column(i) >= cols) break;
    const float4 v = value[i];
    sum += fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x)));
  }
  return block_sum<kNormThreads>(sum, scratch);  // [kNormThreads / 32]
}

template <int kWords>
__device__ __forceinline__ void store_normed(const float4 (&value)[kWords], const float4 (&weight)[kWords],
                                             float inverse, int cols, bf16* out) {  // [cols]
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (norm_column(i) >= cols) break;
    const float4 v = value[i], w = weight[i];
    *reinterpret_cast<uint2*>(out + norm_column(i)) =
        make_uint2(pack_bf16(v.x * inverse * w.x, v.y * inverse * w.y),
                   pack_bf16(v.z * inverse * w.z, v.w * inverse * w.w));
  }
}

// value += added, word by word.
template <int kWords>
__device__ __forceinline__ void add_words(float4 (&value)[kWords], const float4 (&added)[kWords], int cols) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (norm_column(i) >= cols) break;
    value[i].x += added[i].x, value[i].y += added[i].y, value[i].z += added[i].z, value[i].w += added[i].w;
  }
}

}  // namespace rodin::cuda
