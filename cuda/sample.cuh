// What the sampling kernels share. The definition of sampling is addon/ops/sample_args.h; every float
// operation here rounds as it does there, so that both give the same token.
#pragma once

#include "cuda/common.cuh"
#include "ops/noise.h"

namespace rodin::cuda {

// exp(x) for x <= 0 in float32, each operation rounded on its own: the twin of exp_non_positive of the CPU.
__device__ __forceinline__ float exp_non_positive(float x) {
  using noise::add;
  using noise::mul;
  if (!(x > -87.0f)) return 0;
  const float n = add(add(mul(x, 0x1.715476p+0f), 0x1.8p+23f), -0x1.8p+23f);
  const float r = add(add(x, mul(n, -0x1.62e400p-1f)), mul(n, -0x1.7f7d1cp-20f));
  float p = 0.0013950474f;
  p = add(mul(p, r), 0.008368882f);
  p = add(mul(p, r), 0.041666206f);
  p = add(mul(p, r), 0.1666652f);
  p = add(mul(p, r), 0.5f);
  const float e = add(add(mul(mul(r, r), p), r), 1.0f);
  return mul(e, noise::float_from_bits((static_cast<int32_t>(n) + 127) << 23));
}

// Larger is likelier; an empty one loses against everything.
struct Candidate {
  float score = -INFINITY;
  int32_t id = INT32_MAX;
};

__device__ __forceinline__ bool is_likelier(const Candidate& a, const Candidate& b) {
  if (a.id == INT32_MAX || b.id == INT32_MAX) return a.id != INT32_MAX;
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

__device__ __forceinline__ Candidate warp_likeliest(Candidate best) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Candidate other = {__shfl_xor_sync(kAllLanes, best.score, offset),
                             __shfl_xor_sync(kAllLanes, best.id, offset)};
    if (is_likelier(other, best)) best = other;
  }
  return best;
}

// The same in every thread; `scratch` is free again after a barrier.
template <int kThreads>
__device__ __forceinline__ Candidate block_likeliest(Candidate best, Candidate* scratch) {  // [kThreads / 32]
  best = warp_likeliest(best);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = best;
  __syncthreads();
  best = scratch[0];
  for (int i = 1; i < kThreads / 32; ++i) {
    if (is_likelier(scratch[i], best)) best = scratch[i];
  }
  return best;
}

// What one pass over a row's chunks says of the row.
struct RowSummary {
  float max_logit = -INFINITY;
  Candidate best;  // largest z
  bool is_bad = false;

  __device__ bool is_sampled() const { return !is_bad && fabsf(best.score) < INFINITY; }
};

__device__ __forceinline__ RowSummary summarise(const SampleParams& p, int64_t row) {
  RowSummary summary;
  for (int i = 0; i < p.num_chunks; ++i) {
    const SampleChunk chunk = p.chunks[row * p.num_chunks + i];
    summary.max_logit = fmaxf(summary.max_logit, chunk.max_logit);
    summary.is_bad = summary.is_bad || chunk.is_bad;
    const Candidate candidate = {chunk.max_z, chunk.max_id};
    if (is_likelier(candidate, summary.best)) summary.best = candidate;
  }
  return summary;
}

__device__ __forceinline__ const float* adjusted_row(const SampleParams& p, int64_t row) {
  return (p.rows[row].is_adjusted() ? p.adjusted : p.logits) + row * p.vocab_size;
}

__device__ __forceinline__ float score_of(float z, float max, float temperature) {
  return __fdiv_rn(__fsub_rn(z, max), temperature);
}

}  // namespace rodin::cuda
