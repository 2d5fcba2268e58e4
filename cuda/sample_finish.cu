// Sampling, the last kernel: one block of 1024 threads a row joins the chunks, applies min_p, top_k and
// top_p, and selects the likeliest tokens for the log-probabilities.
//
// Every filter keeps a prefix of the order (likelier first, ties by lower id), so the survivors are a
// threshold: all keys above `key`, and of those equal to it the lowest ids up to `last_id`. A threshold is
// found by descending through three digits (11, 11 and 10 bits) of the order-preserving integer key, with a
// histogram of counts (top_k) or of masses (top_p) at each digit. Masses are exp(score) in fixed point,
// 2^-44, so that their sums do not depend on the order in which threads add.
#include "cuda/sample.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 2048;
constexpr double kMassUnit = 0x1p44;

// Rises with x; -0 and +0 are the same.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Threshold {
  uint32_t key = 0;             // everything above survives
  int32_t last_id = INT32_MAX;  // and of the equal ones those up to this id
};

__device__ __forceinline__ bool survives(const Threshold& threshold, uint32_t key, int32_t id) {
  return key > threshold.key || (key == threshold.key && id <= threshold.last_id);
}

// A row's values, or their scores at a temperature.
struct RowScores {
  const float* values;
  int size;
  float max;
  float temperature;  // 0: the values themselves

  __device__ float at(int i) const {
    return temperature == 0 ? values[i] : score_of(values[i], max, temperature);
  }
};

struct FinishShared {
  unsigned long long mass[kBins];  // [kBins] top_k: counts
  unsigned long long total;
  unsigned long long reached;  // above the chosen bin
  uint32_t bin;
  int32_t last_id;
  int32_t num_found;
  Candidate scratch[kThreads / 32];    // [kThreads / 32]
  int32_t warp_counts[kThreads / 32];  // [kThreads / 32]
  float top_values[kSampleMaxTop];     // [kSampleMaxTop]
  int32_t top_ids[kSampleMaxTop];      // [kSampleMaxTop]
};

__device__ __forceinline__ unsigned long long mass_of(float score) {
  return __double2ull_rn(static_cast<double>(exp_non_positive(score)) * kMassUnit);
}

// The lowest id such that `count` of the survivors of `within` with this very key have an id up to it.
__device__ int32_t tie_limit(const RowScores& row, const Threshold& within, uint32_t key, int count,
                             FinishShared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) s.last_id = INT32_MAX;
  __syncthreads();
  int before = 0;
  for (int base = 0; base < row.size; base += kThreads) {
    const int id = base + threadIdx.x;
    const bool is_tie = id < row.size && key_of(row.at(id)) == key && survives(within, key, id);
    const unsigned ballot = __ballot_sync(kAllLanes, is_tie);
    if (lane == 0) s.warp_counts[warp] = __popc(ballot);
    const int found = __syncthreads_count(is_tie);
    if (before + found >= count) {
      int rank = before + __popc(ballot & ((2u << lane) - 1u));  // ties up to this one
      for (int w = 0; w < warp; ++w) rank += s.warp_counts[w];
      if (is_tie && rank == count) s.last_id = id;
      __syncthreads();
      break;
    }
    before += found;
    __syncthreads();
  }
  const int32_t last_id = s.last_id;
  __syncthreads();
  return last_id;
}

// The shortest prefix of the survivors of `within` whose count reaches `wanted` (kMass: whose mass reaches
// `fraction` of all their mass); at least one.
template <bool kMass>
__device__ Threshold shorten(const RowScores& row, const Threshold& within, unsigned long long wanted_count,
                             double fraction, FinishShared& s) {
  const auto weight = [](float score) { return kMass ? mass_of(score) : 1ull; };
  double wanted = static_cast<double>(wanted_count);
  uint32_t prefix = 0;
  unsigned long long reached = 0;
  int shift = 32;
  for (int digit = 0; digit < 3; ++digit) {
    const int bits = digit == 2 ? 10 : 11;
    const int prefix_shift = shift;
    shift -= bits;
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.mass[i] = 0;
    if (threadIdx.x == 0) s.total = 0;
    __syncthreads();
    unsigned long long own = 0;
    for (int id = threadIdx.x; id < row.size; id += kThreads) {
      const float score = row.at(id);
      const uint32_t key = key_of(score);
      if (score == -INFINITY || !survives(within, key, id)) continue;
      if (digit != 0 && key >> prefix_shift != prefix) continue;
      const unsigned long long w = weight(score);
      own += w;
      atomicAdd(&s.mass[(key >> shift) & ((1u << bits) - 1u)], w);
    }
    if (kMass && digit == 0) {
      atomicAdd(&s.total, own);
      __syncthreads();
      wanted = fraction * (static_cast<double>(s.total) / kMassUnit);
    } else {
      __syncthreads();
    }
    // From the top, 32 bins at a time: the first bin at which the sum reaches what is wanted.
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      const double unit = kMass ? kMassUnit : 1.0;
      unsigned long long above = reached, fallback_above = reached;
      int chosen = -1, fallback = 0;
      for (int top = (1 << bits) - 1; top >= 0 && chosen < 0; top -= 32) {
        const int bin = top - lane;
        const unsigned long long own_mass = s.mass[bin];
        unsigned long long sum = own_mass;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const unsigned long long other = __shfl_up_sync(kAllLanes, sum, offset);
          if (lane >= offset) sum += other;
        }
        const bool is_enough = own_mass != 0 && static_cast<double>(above + sum) / unit >= wanted;
        const unsigned hits = __ballot_sync(kAllLanes, is_enough);
        const unsigned filled = __ballot_sync(kAllLanes, own_mass != 0);
        const int lane_of_choice = hits ? __ffs(hits) - 1 : (filled ? 31 - __clz(filled) : -1);
        if (lane_of_choice >= 0) {
          const unsigned long long before = __shfl_sync(kAllLanes, above + sum - own_mass, lane_of_choice);
          if (hits) {
            chosen = top - lane_of_choice;
            above = before;
            break;
          }
          fallback = top - lane_of_choice;
          fallback_above = before;
        }
        above += __shfl_sync(kAllLanes, sum, 31);
      }
      if (lane == 0) {
        s.bin = static_cast<uint32_t>(chosen >= 0 ? chosen : fallback);
        s.reached = chosen >= 0 ? above : fallback_above;
      }
    }
    __syncthreads();
    prefix = (prefix << bits) | s.bin;
    reached = s.reached;
    __syncthreads();
  }

  // `prefix` is a whole key now. How many of the tokens that have it?
  Threshold threshold;
  threshold.key = prefix;
  const uint32_t bits = prefix & 0x80000000u ? prefix & 0x7fffffffu : ~prefix;
  const unsigned long long each = weight(__uint_as_float(bits));
  const double unit = kMass ? kMassUnit : 1.0;
  const double missing = wanted - static_cast<double>(reached) / unit;
  const double one = static_cast<double>(each) / unit;
  const double count = one > 0 ? ceil(missing / one) : static_cast<double>(row.size);
  const int num_ties = count < 1 ? 1 : (count >= row.size ? row.size : static_cast<int>(count));
  threshold.last_id = tie_limit(row, within, prefix, num_ties, s);
  if (prefix == within.key && within.last_id < threshold.last_id) threshold.last_id = within.last_id;
  return threshold;
}

__device__ Candidate noisiest_survivor(const SampleRow& spec, const RowScores& row, FinishShared& s) {
  Threshold threshold;
  if (spec.lowest_score > -3.4028234663852886e38f) threshold.key = key_of(spec.lowest_score);
  if (spec.top_k > 0 && spec.top_k < row.size) {
    threshold = shorten<false>(row, threshold, static_cast<unsigned long long>(spec.top_k), 0, s);
  }
  if (spec.top_p < 1) threshold = shorten<true>(row, threshold, 0, static_cast<double>(spec.top_p), s);
  Candidate best;
  for (int id = threadIdx.x; id < row.size; id += kThreads) {
    const float score = row.at(id);
    if (score == -INFINITY || !survives(threshold, key_of(score), id)) continue;
    const float noise = gumbel_noise(spec.seed_low, spec.seed_high, spec.position, id);
    const Candidate candidate = {__fadd_rn(score, noise), id};
    if (is_likelier(candidate, best)) best = candidate;
  }
  best = block_likeliest<kThreads>(best, s.scratch);
  __syncthreads();
  return best;
}

// The `count` likeliest tokens of a row, by falling logit.
__device__ void write_likeliest(const SampleParams& p, const SampleRow& spec, const RowScores& row,
                                double lse, FinishShared& s) {
  const int count = min(spec.num_top, row.size);
  const Threshold threshold = shorten<false>(row, Threshold{}, static_cast<unsigned long long>(count), 0, s);
  if (threadIdx.x == 0) s.num_found = 0;
  __syncthreads();
  for (int id = threadIdx.x; id < row.size; id += kThreads) {
    if (!survives(threshold, key_of(row.values[id]), id)) continue;
    const int at = atomicAdd(&s.num_found, 1);
    s.top_values[at] = row.values[id];
    s.top_ids[at] = id;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Candidate own = {s.top_values[i], s.top_ids[i]};
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += is_likelier({s.top_values[j], s.top_ids[j]}, own);
    p.top_ids[spec.top_start + rank] = own.id;
    p.top_logprobs[spec.top_start + rank] = static_cast<float>(static_cast<double>(own.score) - lse);
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ SampleParams p) {
  __shared__ FinishShared s;
  const int64_t row = blockIdx.x;
  const SampleRow spec = p.rows[row];
  const RowSummary summary = summarise(p, row);
  SampleOutcome result = {-1, 0.0f, 0.0};
  if (summary.is_sampled()) {
    if (spec.temperature == 0) {
      result.id = summary.best.id;
    } else if (spec.is_filtered()) {
      const RowScores scores = {adjusted_row(p, row), p.vocab_size, summary.best.score, spec.temperature};
      const Candidate best = noisiest_survivor(spec, scores, s);
      result.id = best.id == INT32_MAX ? -1 : best.id;
    } else {
      Candidate best;
      for (int i = 0; i < p.num_chunks; ++i) {
        const SampleNoiseChunk& chunk = p.noise_chunks[row * p.num_chunks + i];
        if (is_likelier({chunk.best, chunk.id}, best)) best = {chunk.best, chunk.id};
      }
      result.id = best.id == INT32_MAX ? -1 : best.id;
    }
  }
  if (result.id >= 0 && spec.num_top >= 0) {
    const float* logits = p.logits + row * p.vocab_size;
    double sum = 0;
    for (int i = 0; i < p.num_chunks; ++i) sum += p.noise_chunks[row * p.num_chunks + i].sum;
    result.lse = static_cast<double>(summary.max_logit) + log(sum);
    result.logprob = static_cast<float>(static_cast<double>(logits[result.id]) - result.lse);
    if (spec.has_device_top()) {
      const RowScores values = {logits, p.vocab_size, 0.0f, 0.0f};
      write_likeliest(p, spec, values, result.lse, s);
    }
  }
  if (threadIdx.x == 0) p.results[row] = result;
}

}  // namespace

void run_sample_finish(const SampleParams& params, cudaStream_t stream) {
  finish_kernel<<<static_cast<unsigned>(params.num_rows), kThreads, 0, stream>>>(params);
  RODIN_CHECK_LAUNCH("finish_kernel");
}

}  // namespace rodin::cuda
