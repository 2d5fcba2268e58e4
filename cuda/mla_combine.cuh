// The splits of one row of attention, put together.
#pragma once

#include "cuda/common.cuh"

namespace rodin::cuda {

// out[j] = latent threadIdx.x + j * kThreads of `row` (token * A + head of the chunk), its splits added in
// order.
template <int kThreads>
__device__ __forceinline__ void combine_splits(const MlaParams& p, int64_t row, int position,
                                               float (&out)[kMlaMaxLora / kThreads]) {
  const int num_splits = (position >> mla_split_shift(position)) + 1;
  const float2* ml = reinterpret_cast<const float2*>(p.partial_ml) + row * p.max_splits;  // maximum and sum
  float max = -INFINITY;
#pragma unroll 8
  for (int i = 0; i < num_splits; ++i) max = fmaxf(max, ml[i].x);
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kMlaMaxLora / kThreads; ++j) out[j] = 0;
#pragma unroll 8
  for (int i = 0; i < num_splits; ++i) {
    const float weight = max == -INFINITY ? 0.0f : exp2f(ml[i].x - max);
    sum = fmaf(ml[i].y, weight, sum);
    const float* partial = p.partial + (row * p.max_splits + i) * p.lora_rank;
#pragma unroll
    for (int j = 0; j < kMlaMaxLora / kThreads; ++j) {
      const int c = threadIdx.x + j * kThreads;
      if (c < p.lora_rank) out[j] = fmaf(partial[c], weight, out[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kMlaMaxLora / kThreads; ++j) out[j] = sum > 0 ? out[j] / sum : out[j];
}

}  // namespace rodin::cuda
