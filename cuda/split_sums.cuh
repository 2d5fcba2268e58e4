// The splits of one row of attention that a thread adds: what mla_combine.cuh does, in its order, for threads
// that share a row by even and odd splits and for latents of kMlaMaxLora. Apart from it, because the kernels
// of many rows have no registers to spare for one function for all.
#pragma once

#include "cuda/mla_combine.cuh"

namespace rodin::cuda {

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

// Where a row's splits lie (row: token * A + head of the chunk).
struct SplitRow {
  const float2* ml;      // maximum and sum of each
  const float* partial;  // [num_splits, kMlaMaxLora]
  int num_splits;

  __device__ __forceinline__ SplitRow(const MlaParams& p, int64_t row, int position)
      : ml(reinterpret_cast<const float2*>(p.partial_ml) + row * p.max_splits),
        partial(p.partial + row * p.max_splits * kMlaMaxLora),
        num_splits((position >> mla_split_shift(position, p.spread)) + 1) {}
};

// Columns 4 * (threadIdx.x % 128) .. of a row: the even splits, or if `is_odd` the odd ones, in order, to
// total[0].
__device__ __forceinline__ SplitSums add_splits(const SplitRow& row, int is_odd) {
  const int quad = threadIdx.x % kCombineQuads, lane = threadIdx.x % 32;
  constexpr int kAtOnce = 8;  // loads of a thread
  float max = -INFINITY;
  SplitSums own = {};
  float4& total = own.total[0];
  for (int first = 0; first < row.num_splits; first += 32) {
    const int count = min(32, row.num_splits - first);
    float4 parts[kAtOnce];  // [kAtOnce]
    const auto split_of = [&](int base, int i) { return base + 2 * i + is_odd; };
    const auto load_parts = [&](int base) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int split = split_of(base, i);
        const float* at = row.partial + static_cast<int64_t>(first + split) * kMlaMaxLora;
        parts[i] = split < count ? load_quad(at, quad, kMlaMaxLora) : make_float4(0, 0, 0, 0);
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
    total.x *= shrink, total.y *= shrink, total.z *= shrink, total.w *= shrink;
    for (int base = 0; base < count; base += 2 * kAtOnce) {
      if (base > 0) load_parts(base);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float split_weight = __shfl_sync(kAllLanes, weight, split_of(base, i) % 32);
        total.x = fmaf(parts[i].x, split_weight, total.x);
        total.y = fmaf(parts[i].y, split_weight, total.y);
        total.z = fmaf(parts[i].z, split_weight, total.z);
        total.w = fmaf(parts[i].w, split_weight, total.w);
      }
    }
  }
  return own;
}

}  // namespace rodin::cuda
