// Sampling, the parts that every row needs, over chunks of the vocabulary so that one row keeps many blocks
// busy:
//   adjust_copy, adjust   z = logits + bias, penalties, mask; only rows that have any, into their own copy
//   scan_chunk            of each chunk: largest logit, largest z and its lowest id, whether all logits are
//                         finite
//   noise_chunk           of each chunk: largest score + noise (rows without filters), sum of exp (rows with
//                         log-probabilities); left out where no row needs either
//   select                sample_select.cu: rows with filters, likeliest tokens
//   finish                joins the chunks
// Grid: (chunks, rows); adjust, finish: (rows). Bound by bytes: the logits once or twice.
#include "cuda/sample.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kSampleChunk % 4 == 0);

__global__ void __launch_bounds__(kThreads) adjust_copy_kernel(const __grid_constant__ SampleParams p) {
  const int64_t row = blockIdx.y;
  if (!p.rows[row].is_adjusted()) return;
  const int end = min(static_cast<int>(blockIdx.x + 1) * kSampleChunk, p.vocab_size);
  for (int i = static_cast<int>(blockIdx.x) * kSampleChunk + threadIdx.x; i < end; i += kThreads) {
    p.adjusted[row * p.vocab_size + i] = p.logits[row * p.vocab_size + i];
  }
}

__global__ void __launch_bounds__(kThreads) adjust_kernel(const __grid_constant__ SampleParams p) {
  const int64_t row = blockIdx.x;
  const SampleRow spec = p.rows[row];
  if (!spec.is_adjusted()) return;
  float* z = p.adjusted + row * p.vocab_size;
  for (int i = spec.bias_begin + threadIdx.x; i < spec.bias_end; i += kThreads) {
    atomicAdd(z + p.bias_ids[i], p.bias_values[i]);
  }
  __syncthreads();
  for (int i = spec.history_begin + threadIdx.x; i < spec.history_end; i += kThreads) {
    float* at = z + p.history_ids[i];
    const int count = p.history_counts[i];
    float logit = *at;
    if (spec.repetition != 1) {
      logit = logit > 0 ? __fdiv_rn(logit, spec.repetition) : __fmul_rn(logit, spec.repetition);
    }
    logit = __fsub_rn(logit, __fmul_rn(spec.frequency, static_cast<float>(count)));
    if (count > 0) logit = __fsub_rn(logit, spec.presence);
    *at = logit;
  }
  if (spec.mask_begin == spec.mask_end) return;
  __syncthreads();
  for (int i = threadIdx.x; i < p.vocab_size; i += kThreads) {
    const uint32_t word = static_cast<uint32_t>(p.masks[spec.mask_begin + i / 32]);
    if (((word >> (i % 32)) & 1) == 0) z[i] = -INFINITY;
  }
}

__global__ void __launch_bounds__(kThreads) scan_chunk_kernel(const __grid_constant__ SampleParams p) {
  __shared__ Candidate scratch[kThreads / 32];  // [kThreads / 32]
  const int64_t row = blockIdx.y;
  const float* logits = p.logits + row * p.vocab_size;
  const float* z = adjusted_row(p, row);
  const int end = min(static_cast<int>(blockIdx.x + 1) * kSampleChunk, p.vocab_size);
  Candidate best;
  float max_logit = -INFINITY;
  int is_bad = 0;
  for (int i = static_cast<int>(blockIdx.x) * kSampleChunk + threadIdx.x; i < end; i += kThreads) {
    const float logit = logits[i];
    is_bad |= !(fabsf(logit) < INFINITY);
    max_logit = fmaxf(max_logit, logit);
    const Candidate candidate = {z[i], i};
    if (is_likelier(candidate, best)) best = candidate;
  }
  is_bad = __syncthreads_or(is_bad);
  best = block_likeliest<kThreads>(best, scratch);
  __syncthreads();
  const Candidate most = block_likeliest<kThreads>({max_logit, static_cast<int32_t>(threadIdx.x)}, scratch);
  if (threadIdx.x == 0) {
    p.chunks[row * p.num_chunks + blockIdx.x] = {most.score, best.score, best.id, is_bad};
  }
}

__global__ void __launch_bounds__(kThreads) noise_chunk_kernel(const __grid_constant__ SampleParams p) {
  __shared__ Candidate scratch[kThreads / 32];  // [kThreads / 32]
  __shared__ double sums[kThreads];             // [kThreads]
  const int64_t row = blockIdx.y;
  const SampleRow spec = p.rows[row];
  const bool needs_noise = spec.needs_noise();
  const bool needs_sum = spec.num_top >= 0;
  if (!needs_noise && !needs_sum) return;
  const RowSummary summary = summarise(p, row);
  if (!summary.is_sampled()) return;
  const int begin = static_cast<int>(blockIdx.x) * kSampleChunk;
  const int end = min(begin + kSampleChunk, p.vocab_size);
  SampleNoiseChunk& chunk = p.noise_chunks[row * p.num_chunks + blockIdx.x];
  if (needs_noise) {
    const float* z = adjusted_row(p, row);
    Candidate best;
    for (int first = begin + 4 * threadIdx.x; first < end; first += 4 * kThreads) {
      const PhiloxWords words =
          philox4x32({{static_cast<uint32_t>(spec.position), static_cast<uint32_t>(first) >> 2, 0, 0}},
                     spec.seed_low, spec.seed_high);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + j >= end) break;
        const float score = score_of(z[first + j], summary.best.score, spec.temperature);
        const Candidate candidate = {__fadd_rn(score, noise::gumbel(words.w[j])), first + j};
        if (is_likelier(candidate, best)) best = candidate;
      }
    }
    best = block_likeliest<kThreads>(best, scratch);
    if (threadIdx.x == 0) {
      chunk.best = best.score;
      chunk.id = best.id;
    }
  }
  if (needs_sum) {
    const float* logits = p.logits + row * p.vocab_size;
    double sum = 0;
    for (int i = begin + threadIdx.x; i < end; i += kThreads) {
      sum += static_cast<double>(exp_non_positive(__fsub_rn(logits[i], summary.max_logit)));
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) chunk.sum = sums[0];
  }
}

// A warp a row.
__global__ void __launch_bounds__(32) finish_kernel(const __grid_constant__ SampleParams p) {
  const int64_t row = blockIdx.x;
  const SampleRow spec = p.rows[row];
  const RowSummary summary = summarise(p, row);
  SampleOutcome result = {-1, 0.0f, 0.0};
  if (summary.is_sampled()) {
    Candidate best = summary.best;
    if (spec.temperature != 0) {
      best = Candidate{};
      const int num_chunks = spec.is_filtered() ? 1 : p.num_chunks;
      for (int i = threadIdx.x; i < num_chunks; i += 32) {
        const SampleNoiseChunk& chunk = p.noise_chunks[row * p.num_chunks + i];
        if (is_likelier({chunk.best, chunk.id}, best)) best = {chunk.best, chunk.id};
      }
      best = warp_likeliest(best);
    }
    result.id = best.id == INT32_MAX ? -1 : best.id;
  }
  if (result.id >= 0 && spec.num_top >= 0) {
    result.lse = log_sum_exp(p, row, summary);
    const float logit = p.logits[row * p.vocab_size + result.id];
    result.logprob = static_cast<float>(static_cast<double>(logit) - result.lse);
  }
  if (threadIdx.x == 0) p.results[row] = result;
}

}  // namespace

void run_sample(const SampleParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const dim3 grid(static_cast<unsigned>(params.num_chunks), static_cast<unsigned>(params.num_rows));
  if (params.has_adjusted) {
    adjust_copy_kernel<<<grid, kThreads, 0, stream>>>(params);
    RODIN_CHECK_LAUNCH("adjust_copy_kernel");
    adjust_kernel<<<static_cast<unsigned>(params.num_rows), kThreads, 0, stream>>>(params);
    RODIN_CHECK_LAUNCH("adjust_kernel");
  }
  scan_chunk_kernel<<<grid, kThreads, 0, stream>>>(params);
  RODIN_CHECK_LAUNCH("scan_chunk_kernel");
  if (params.has_noise) {
    noise_chunk_kernel<<<grid, kThreads, 0, stream>>>(params);
    RODIN_CHECK_LAUNCH("noise_chunk_kernel");
  }
  if (params.has_selection) run_sample_select(params, stream);
  finish_kernel<<<static_cast<unsigned>(params.num_rows), 32, 0, stream>>>(params);
  RODIN_CHECK_LAUNCH("finish_kernel");
}

}  // namespace rodin::cuda
