// What the sampling kernels share. The definition of sampling is addon/ops/sample_args.h; every float
// operation here rounds as it does there, so that both give the same token.
#pragma once

#include "cuda/common.cuh"
#include "ops/noise.h"

namespace rodin::cuda {

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

// Called by whole warps; the same in every lane.
__device__ __forceinline__ RowSummary summarise(const SampleParams& p, int64_t row) {
  RowSummary summary;
  for (int i = threadIdx.x % 32; i < p.num_chunks; i += 32) {
    const SampleChunk chunk = p.chunks[row * p.num_chunks + i];
    summary.max_logit = fmaxf(summary.max_logit, chunk.max_logit);
    summary.is_bad = summary.is_bad || chunk.is_bad;
    const Candidate candidate = {chunk.max_z, chunk.max_id};
    if (is_likelier(candidate, summary.best)) summary.best = candidate;
  }
  summary.best = warp_likeliest(summary.best);
  summary.is_bad = __any_sync(kAllLanes, summary.is_bad);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    summary.max_logit = fmaxf(summary.max_logit, __shfl_xor_sync(kAllLanes, summary.max_logit, offset));
  }
  return summary;
}

// Of a row's raw logits, for which the chunks have their sums.
__device__ __forceinline__ double log_sum_exp(const SampleParams& p, int64_t row, const RowSummary& summary) {
  double sum = 0;
  for (int i = 0; i < p.num_chunks; ++i) sum += p.noise_chunks[row * p.num_chunks + i].sum;
  return static_cast<double>(summary.max_logit) + log(sum);
}

// Scores that one of the blocks of a row keeps.
__host__ __device__ constexpr int select_slice_size(int vocab_size) { return (vocab_size + 31) / 32 * 4; }

__device__ __forceinline__ const float* adjusted_row(const SampleParams& p, int64_t row) {
  return (p.rows[row].is_adjusted() ? p.adjusted : p.logits) + row * p.vocab_size;
}

__device__ __forceinline__ float score_of(float z, float max, float temperature) {
  return __fdiv_rn(__fsub_rn(z, max), temperature);
}

}  // namespace rodin::cuda
