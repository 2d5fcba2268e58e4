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

// The splits of one row that a thread adds, and the sum of all splits' weights.
struct SplitSums {
  float4 total[2];  // [2] of the even splits, of the odd ones
  float sum;
};
__device__ __forceinline__ float4 divided(const SplitSums& of) {
  const float divisor = of.sum > 0 ? of.sum : 1.0f;
  return make_float4((of.total[0].x + of.total[1].x) / divisor, (of.total[0].y + of.total[1].y) / divisor,
                     (of.total[0].z + of.total[1].z) / divisor, (of.total[0].w + of.total[1].w) / divisor);
}

// Where a row's splits lie (row: token * A + head of the chunk). kLora: lora_rank, where it is known.
template <int kLora = 0>
struct SplitRow {
  const float2* ml;      // maximum and sum of each
  const float* partial;  // [num_splits, lora_rank]
  int num_splits, lora_rank;

  __device__ __forceinline__ SplitRow(const MlaParams& p, int64_t row, int position)
      : ml(reinterpret_cast<const float2*>(p.partial_ml) + row * p.max_splits),
        num_splits((position >> mla_split_shift(position, p.spread)) + 1),
        lora_rank(kLora > 0 ? kLora : p.lora_rank) {
    partial = p.partial + row * p.max_splits * (kLora > 0 ? kLora : p.lora_rank);
  }
};

// Columns 4 * (threadIdx.x % 128) .. of a row: even splits in order, odd ones too. With two groups of
// threads, `group` 0 adds the even ones and 1 the odd ones, each to its total[0].
template <int kGroups, int kLora>
__device__ __forceinline__ SplitSums add_splits(const SplitRow<kLora>& row, int group) {
  static_assert(kGroups == 1 || kGroups == 2);
  const int quad = threadIdx.x % kCombineQuads, lane = threadIdx.x % 32;
  const int lora_rank = kLora > 0 ? kLora : row.lora_rank;
  constexpr int kAtOnce = 8;  // loads of a thread
  float max = -INFINITY;
  SplitSums own = {};
  float4(&total)[2] = own.total;
  for (int first = 0; first < row.num_splits; first += 32) {
    const int count = min(32, row.num_splits - first);
    float4 parts[kAtOnce];  // [kAtOnce]
    const auto split_of = [&](int base, int i) { return base + (kGroups == 2 ? 2 * i + group : i); };
    const auto load_parts = [&](int base) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int split = split_of(base, i);
        const float* at = row.partial + static_cast<int64_t>(first + split) * lora_rank;
        parts[i] = split < count ? load_quad(at, quad, lora_rank) : make_float4(0, 0, 0, 0);
      }
    };
    const float2 local = lane < count ? row.ml[first + lane] : make_float2(-INFINITY, 0);
    load_parts(0);
    float new_max = local.x;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, offset));
    new_max = fmaxf(max, new_max);
    const float shrink = max == -INFINITY ? 0.0f : exp2f(max - new_max);
    const float weight = local.x == -INFINITY ? 0.0f : exp2f(local.x - new_max);
    max = new_max;
    own.sum = fmaf(own.sum, shrink, warp_sum(local.y * weight));
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
  return own;
}

// The row's columns, put together. With 256 threads each half of them adds some of the splits, and the first
// half gets the result; `scratch` is theirs.
template <int kThreads, int kLora = 0>
__device__ __forceinline__ float4 combine_splits(const MlaParams& p, int64_t row, int position,
                                                 float4* scratch) {  // [kCombineQuads]
  constexpr int kGroups = kThreads / kCombineQuads;
  const int quad = threadIdx.x % kCombineQuads, group = threadIdx.x / kCombineQuads % kGroups;
  SplitSums own = add_splits<kGroups>(SplitRow<kLora>(p, row, position), group);
  if constexpr (kGroups == 2) {
    if (group == 1) scratch[quad] = own.total[0];
    __syncthreads();
    if (group == 0) own.total[1] = scratch[quad];
  }
  return divided(own);
}

}  // namespace rodin::cuda
