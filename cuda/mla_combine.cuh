// The splits of one row of attention, put together.
#pragma once

#include "cuda/common.cuh"

namespace rodin::cuda {

constexpr int kCombineQuads = kMlaMaxLora / 4;  // columns, four of a thread

// A row's four columns from 4 * quad on; zeros behind the last one.
__device__ __forceinline__ float4 load_quad(const float* row, int quad, int cols) {
  if (cols % 4 == 0)
    return 4 * quad < cols ? reinterpret_cast<const float4*>(row)[quad] : make_float4(0, 0, 0, 0);
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = 4 * quad + i < cols ? row[4 * quad + i] : 0.0f;
  return make_float4(values[0], values[1], values[2], values[3]);
}

// Columns 4 * (threadIdx.x % 128) .. of `row` (token * A + head of the chunk). Even splits are added in
// order, odd ones too, and then the two sums. With 256 threads each half of them has one, and the first half
// gets the result; `scratch` is theirs.
template <int kThreads>
__device__ __forceinline__ float4 combine_splits(const MlaParams& p, int64_t row, int position,
                                                 float4* scratch) {  // [kCombineQuads]
  constexpr int kGroups = kThreads / kCombineQuads;
  static_assert(kGroups == 1 || kGroups == 2);
  const int quad = threadIdx.x % kCombineQuads, group = threadIdx.x / kCombineQuads % kGroups,
            lane = threadIdx.x % 32;
  const int num_splits = (position >> mla_split_shift(position, p.spread)) + 1;
  const float2* ml = reinterpret_cast<const float2*>(p.partial_ml) + row * p.max_splits;  // maximum and sum
  const float* partial = p.partial + row * p.max_splits * p.lora_rank;
  constexpr int kAtOnce = 8;  // loads of a thread
  float max = -INFINITY, sum = 0;
  float4 total[2] =
      {};  // [2] of the even splits, of the odd ones; with two groups, the first is a thread's own
  for (int first = 0; first < num_splits; first += 32) {
    const int count = min(32, num_splits - first);
    float4 parts[kAtOnce];  // [kAtOnce]
    const auto split_of = [&](int base, int i) { return base + (kGroups == 2 ? 2 * i + group : i); };
    const auto load_parts = [&](int base) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int split = split_of(base, i);
        const float* at = partial + static_cast<int64_t>(first + split) * p.lora_rank;
        parts[i] = split < count ? load_quad(at, quad, p.lora_rank) : make_float4(0, 0, 0, 0);
      }
    };
    load_parts(0);
    const float2 own = lane < count ? ml[first + lane] : make_float2(-INFINITY, 0);
    float new_max = own.x;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, offset));
    new_max = fmaxf(max, new_max);
    const float shrink = max == -INFINITY ? 0.0f : exp2f(max - new_max);
    const float weight = own.x == -INFINITY ? 0.0f : exp2f(own.x - new_max);
    max = new_max;
    sum = fmaf(sum, shrink, warp_sum(own.y * weight));
#pragma unroll
    for (int i = 0; i < 2; ++i)
      total[i].x *= shrink, total[i].y *= shrink, total[i].z *= shrink, total[i].w *= shrink;
    for (int base = 0; base < count; base += kAtOnce * kGroups) {
      if (base > 0) load_parts(base);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float split_weight = __shfl_sync(kAllLanes, weight, split_of(base, i) % 32);
        float4& to = total[kGroups == 1 ? i % 2 : 0];
        to.x = fmaf(parts[i].x, split_weight, to.x);
        to.y = fmaf(parts[i].y, split_weight, to.y);
        to.z = fmaf(parts[i].z, split_weight, to.z);
        to.w = fmaf(parts[i].w, split_weight, to.w);
      }
    }
  }
  if constexpr (kGroups == 2) {
    if (group == 1) scratch[quad] = total[0];
    __syncthreads();
    if (group == 0) total[1] = scratch[quad];
  }
  const float divisor = sum > 0 ? sum : 1.0f;
  return make_float4((total[0].x + total[1].x) / divisor, (total[0].y + total[1].y) / divisor,
                     (total[0].z + total[1].z) / divisor, (total[0].w + total[1].w) / divisor);
}

}  // namespace rodin::cuda
