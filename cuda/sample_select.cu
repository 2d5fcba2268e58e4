// Sampling, rows that need an order of the whole vocabulary: what min_p, top_k and top_p leave, and the
// likeliest tokens for the log-probabilities.
//
// Every filter keeps a prefix of the order (likelier first, ties by lower id), so the survivors are a
// threshold: all keys above `key`, and of those equal to it the lowest ids up to `last_id`. A threshold is
// found by cutting what it may be into 16 parts again and again, at first by distance from the largest score,
// then by the order-preserving integer key: in each round the sums of what lies in a part or above, counts
// for top_k, masses for top_p. Masses are exp(score) in fixed point, 2^-44, so that their sums do not depend
// on the order in which they are added.
//
// Grid: (8, rows), a cluster of 8 blocks of 1024 threads a row. Each block keeps an eighth of the row's
// scores in shared memory and its sums in registers (atomics on shared memory meet in few bins, for scores
// are alike); blocks add theirs up through distributed shared memory. Bound by the first round, which looks
// at every score.
#include <cooperative_groups.h>

#include "cuda/sample.cuh"
#include "ops/check.h"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 8;  // of a row
constexpr int kPartBits = 4;
constexpr int kParts = 1 << kPartBits;
constexpr double kMassUnit = 0x1p44;
using Mass = unsigned long long;

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

// A block's share of a row.
struct Slice {
  const float* scores;  // [size] shared memory
  int first;            // id of scores[0], a multiple of 4
  int size;
};

struct SelectShared {
  Mass warp_sums[kWarps][kParts];   // [kWarps, kParts]
  Mass block_sums[2][kParts];       // [2, kParts] used in turn, read by the other blocks
  Mass row_sums[kParts];            // [kParts]
  Candidate scratch[kWarps];        // [kWarps]
  Candidate best;                   // of the block
  int32_t warp_counts[kWarps];      // [kWarps]
  int32_t num_ties;                 // of the block
  int32_t last_id;                  // the tie looked for, where it is this block's
  int32_t num_found;                // in the first block
  float top_values[kSampleMaxTop];  // [kSampleMaxTop] in the first block
  int32_t top_ids[kSampleMaxTop];   // [kSampleMaxTop] in the first block
};

__device__ __forceinline__ Mass mass_of(float score) {
  return __double2ull_rn(static_cast<double>(exp_non_positive(score)) * kMassUnit);
}

// Lanes 2 * kHalf apart exchange half of their sums each: sums[0 .. kHalf - 1] are left, of the lower lane's
// half or of the upper's.
template <int kHalf>
__device__ __forceinline__ void exchange(Mass (&sums)[kParts]) {
  const bool is_upper = (threadIdx.x & (2 * kHalf)) != 0;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const Mass sent = is_upper ? sums[j] : sums[j + kHalf];
    const Mass kept = is_upper ? sums[j + kHalf] : sums[j];
    sums[j] = kept + __shfl_xor_sync(kAllLanes, sent, 2 * kHalf);
  }
}

// row_sums[j] = the sum of every thread's sums[j], in all blocks. `phase` alternates between calls.
__device__ __forceinline__ void sum_over_row(Mass (&sums)[kParts], int phase, SelectShared& s) {
  const auto cluster = cooperative_groups::this_cluster();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  static_assert(kParts == 16);
  exchange<8>(sums);
  exchange<4>(sums);
  exchange<2>(sums);
  exchange<1>(sums);  // lanes 2 j and 2 j + 1 are left with sum j
  sums[0] += __shfl_xor_sync(kAllLanes, sums[0], 1);
  if (lane % 2 == 0) s.warp_sums[warp][lane / 2] = sums[0];
  __syncthreads();
  if (threadIdx.x < kParts) {
    Mass sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += s.warp_sums[w][threadIdx.x];
    s.block_sums[phase][threadIdx.x] = sum;
  }
  cluster.sync();
  if (threadIdx.x < kParts) {
    Mass sum = 0;
    for (int block = 0; block < kBlocks; ++block) {
      sum += *cluster.map_shared_rank(&s.block_sums[phase][threadIdx.x], block);
    }
    s.row_sums[threadIdx.x] = sum;
  }
  __syncthreads();
}

// The lowest id such that `count` of the survivors of `within` with this very key have an id up to it; any
// larger one where there are no more of them.
__device__ int32_t tie_limit(const Slice& row, const Threshold& within, uint32_t key, int count,
                             SelectShared& s) {
  const auto cluster = cooperative_groups::this_cluster();
  const auto rank = static_cast<int>(cluster.block_rank());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto is_tie = [&](int i) {
    return i < row.size && key_of(row.scores[i]) == key && survives(within, key, row.first + i);
  };
  if (threadIdx.x == 0) {
    s.num_ties = 0;
    s.last_id = INT32_MAX;
  }
  __syncthreads();
  int own = 0;
  for (int i = threadIdx.x; i < row.size; i += kThreads) own += is_tie(i);
  if (own != 0) atomicAdd(&s.num_ties, own);
  cluster.sync();
  int before = 0, total = 0;
  for (int block = 0; block < kBlocks; ++block) {
    const int ties = *cluster.map_shared_rank(&s.num_ties, block);
    if (block < rank) before += ties;
    total += ties;
  }
  if (total > count && before < count && count <= before + s.num_ties) {
    int seen = before;
    for (int base = 0; base < row.size; base += kThreads) {
      const bool found = is_tie(base + static_cast<int>(threadIdx.x));
      const unsigned ballot = __ballot_sync(kAllLanes, found);
      if (lane == 0) s.warp_counts[warp] = __popc(ballot);
      const int num_found = __syncthreads_count(found);
      if (seen + num_found >= count) {
        int number = seen + __popc(ballot & ((2u << lane) - 1u));  // of this tie
        for (int w = 0; w < warp; ++w) number += s.warp_counts[w];
        if (found && number == count) s.last_id = row.first + base + static_cast<int>(threadIdx.x);
        break;
      }
      seen += num_found;
      __syncthreads();
    }
  }
  cluster.sync();
  int32_t last_id = INT32_MAX;
  for (int block = 0; block < kBlocks; ++block) {
    last_id = min(last_id, *cluster.map_shared_rank(&s.last_id, block));
  }
  cluster.sync();  // the next call writes what was read
  return last_id;
}

// The shortest prefix of the survivors of `within` whose count reaches `wanted_count` (kMass: whose mass
// reaches `fraction` of all their mass); at least one. `largest`: of the row's scores.
template <bool kMass>
__device__ Threshold shorten(const Slice& row, float largest, const Threshold& within, Mass wanted_count,
                             double fraction, SelectShared& s) {
  const auto weight = [](float score) { return kMass ? mass_of(score) : Mass{1}; };
  const double unit = kMass ? kMassUnit : 1.0;
  double wanted = static_cast<double>(wanted_count);
  Mass reached = 0;
  // From the top: the first of 16 parts that holds anything and at which the sum reaches what is wanted, or
  // the lowest that holds anything. Lanes j and j + 16 look at part j.
  const auto choose = [&] {
    const int part = threadIdx.x % kParts;
    const Mass sum = s.row_sums[part];
    const bool is_filled = sum != (part + 1 == kParts ? 0 : s.row_sums[part + 1]);
    const bool is_enough = is_filled && static_cast<double>(reached + sum) / unit >= wanted;
    const unsigned filled = __ballot_sync(kAllLanes, is_filled), enough = __ballot_sync(kAllLanes, is_enough);
    const int highest_enough = (31 - __clz(static_cast<int>(enough))) % kParts;
    const int chosen = enough != 0 ? highest_enough : filled != 0 ? __ffs(static_cast<int>(filled)) - 1 : 0;
    if (chosen + 1 < kParts) reached += s.row_sums[chosen + 1];
    return chosen;
  };

  // At first by distance from the largest score, part 15 within 1 of it, part 0 from 15 on.
  const auto first_part = [largest](float score) {
    return kParts - 1 - static_cast<int>(fminf(__fsub_rn(largest, score), kParts - 1));
  };
  Mass sums[kParts] = {};  // [kParts] of the own elements in part j or above
  for (int i = threadIdx.x; i < row.size; i += kThreads) {
    const float score = row.scores[i];
    if (score == -INFINITY || !survives(within, key_of(score), row.first + i)) continue;
    const Mass own = weight(score);
    if (own == 0) continue;
    const int part = first_part(score);
#pragma unroll
    for (int j = 0; j < kParts; ++j) sums[j] += part >= j ? own : 0;
  }
  sum_over_row(sums, 0, s);
  if (kMass) wanted = fraction * (static_cast<double>(s.row_sums[0]) / kMassUnit);
  const int chosen = choose();
  uint64_t left = 0;  // bit k: scores[threadIdx.x + k * kThreads] is in what was chosen so far
  for (int i = threadIdx.x, k = 0; i < row.size; i += kThreads, ++k) {
    const float score = row.scores[i];
    if (score == -INFINITY || first_part(score) != chosen) continue;
    if (survives(within, key_of(score), row.first + i)) left |= uint64_t{1} << k;
  }

  // Then by keys, lo .. last, until that is one. With 0 as the largest score the distances above are exact.
  uint32_t lo = 0, last = UINT32_MAX;
  if (largest == 0) {
    last = key_of(static_cast<float>(chosen - (kParts - 1)));
    if (chosen > 0) lo = key_of(static_cast<float>(chosen - kParts)) + 1;
  }
  for (int phase = 1; lo != last; phase ^= 1) {
    const int shift = max(0, 32 - kPartBits - __clz(last - lo));
#pragma unroll
    for (int j = 0; j < kParts; ++j) sums[j] = 0;
    for (uint64_t rest = left; rest != 0; rest &= rest - 1) {
      const int k = __ffsll(static_cast<long long>(rest)) - 1;
      const float score = row.scores[threadIdx.x + k * kThreads];
      const uint32_t key = key_of(score);
      if (key < lo || key > last) {
        left &= ~(uint64_t{1} << k);
        continue;
      }
      const Mass own = weight(score);
      const int part = static_cast<int>((key - lo) >> shift);
#pragma unroll
      for (int j = 0; j < kParts; ++j) sums[j] += part >= j ? own : 0;
    }
    sum_over_row(sums, phase, s);
    lo += static_cast<uint32_t>(choose()) << shift;
    last = static_cast<uint32_t>(min(uint64_t{last}, lo + (uint64_t{1} << shift) - 1));
  }

  // How many of the tokens that have this key?
  Threshold threshold;
  threshold.key = lo;
  const uint32_t bits = lo & 0x80000000u ? lo & 0x7fffffffu : ~lo;
  const Mass each = weight(__uint_as_float(bits));
  const double missing = wanted - static_cast<double>(reached) / unit;
  const double one = static_cast<double>(each) / unit;
  const double count = one > 0 ? ceil(missing / one) : 1e9;
  const int num_ties = count < 1 ? 1 : (count >= 1e9 ? 1000000000 : static_cast<int>(count));
  threshold.last_id = tie_limit(row, within, lo, num_ties, s);
  if (lo == within.key && within.last_id < threshold.last_id) threshold.last_id = within.last_id;
  return threshold;
}

// The survivor of the filters with the largest score + noise, as chunk 0's.
__device__ void write_noisiest(const SampleParams& p, int64_t row_index, const SampleRow& spec,
                               const Slice& row, SelectShared& s) {
  const auto cluster = cooperative_groups::this_cluster();
  Threshold threshold;
  if (spec.lowest_score > -3.4028234663852886e38f) threshold.key = key_of(spec.lowest_score);
  if (spec.top_k > 0 && spec.top_k < p.vocab_size) {
    threshold = shorten<false>(row, 0, threshold, static_cast<Mass>(spec.top_k), 0, s);
  }
  if (spec.top_p < 1) threshold = shorten<true>(row, 0, threshold, 0, static_cast<double>(spec.top_p), s);
  Candidate best;
  for (int quad = 4 * threadIdx.x; quad < row.size; quad += 4 * kThreads) {
    const int id = row.first + quad;
    bool is_left[4];
    bool is_any = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float score = quad + j < row.size ? row.scores[quad + j] : -INFINITY;
      is_left[j] = score != -INFINITY && survives(threshold, key_of(score), id + j);
      is_any = is_any || is_left[j];
    }
    if (!is_any) continue;
    const PhiloxWords words =
        philox4x32({{static_cast<uint32_t>(spec.position), static_cast<uint32_t>(id) >> 2, 0, 0}},
                   spec.seed_low, spec.seed_high);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!is_left[j]) continue;
      const Candidate candidate = {__fadd_rn(row.scores[quad + j], noise::gumbel(words.w[j])), id + j};
      if (is_likelier(candidate, best)) best = candidate;
    }
  }
  best = block_likeliest<kThreads>(best, s.scratch);
  if (threadIdx.x == 0) s.best = best;
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x == 0) {
    for (int block = 1; block < kBlocks; ++block) {
      const Candidate other = *cluster.map_shared_rank(&s.best, block);
      if (is_likelier(other, best)) best = other;
    }
    SampleNoiseChunk& chunk = p.noise_chunks[row_index * p.num_chunks];
    chunk.best = best.score;
    chunk.id = best.id;
  }
}

// The `num_top` likeliest tokens of a row, by falling logit.
__device__ void write_likeliest(const SampleParams& p, const SampleRow& spec, const Slice& row, float largest,
                                double lse, SelectShared& s) {
  const auto cluster = cooperative_groups::this_cluster();
  const int count = min(spec.num_top, p.vocab_size);
  if (threadIdx.x == 0) s.num_found = 0;  // seen by the others behind the barriers of shorten()
  const Threshold threshold = shorten<false>(row, largest, Threshold{}, static_cast<Mass>(count), 0, s);
  int32_t* num_found = cluster.map_shared_rank(&s.num_found, 0);
  float* top_values = cluster.map_shared_rank(s.top_values, 0);
  int32_t* top_ids = cluster.map_shared_rank(s.top_ids, 0);
  for (int i = threadIdx.x; i < row.size; i += kThreads) {
    if (!survives(threshold, key_of(row.scores[i]), row.first + i)) continue;
    const int at = atomicAdd(num_found, 1);
    top_values[at] = row.scores[i];
    top_ids[at] = row.first + i;
  }
  cluster.sync();
  if (cluster.block_rank() != 0) return;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Candidate own = {s.top_values[i], s.top_ids[i]};
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += is_likelier({s.top_values[j], s.top_ids[j]}, own);
    p.top_ids[spec.top_start + rank] = own.id;
    p.top_logprobs[spec.top_start + rank] = static_cast<float>(static_cast<double>(own.score) - lse);
  }
}

__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ SampleParams p) {
  extern __shared__ float scores[];  // [slice_size]
  __shared__ SelectShared s;
  const auto cluster = cooperative_groups::this_cluster();
  const int64_t row = blockIdx.y;
  const SampleRow spec = p.rows[row];
  if (!spec.needs_selection() && !spec.has_device_top()) return;  // all blocks of a cluster alike
  const RowSummary summary = summarise(p, row);
  if (!summary.is_sampled()) return;
  const int slice_size = select_slice_size(p.vocab_size);
  const int first = static_cast<int>(cluster.block_rank()) * slice_size;
  const Slice slice = {scores, first, max(0, min(slice_size, p.vocab_size - first))};
  if (spec.needs_selection()) {
    const float* z = adjusted_row(p, row);
    for (int i = threadIdx.x; i < slice.size; i += kThreads) {
      scores[i] = score_of(z[first + i], summary.best.score, spec.temperature);
    }
    __syncthreads();
    write_noisiest(p, row, spec, slice, s);
  }
  if (spec.has_device_top()) {
    const float* logits = p.logits + row * p.vocab_size;
    __syncthreads();
    for (int i = threadIdx.x; i < slice.size; i += kThreads) scores[i] = logits[first + i];
    __syncthreads();
    write_likeliest(p, spec, slice, summary.max_logit, log_sum_exp(p, row, summary), s);
  }
  cluster.sync();  // no block ends while another reads its shared memory
}

}  // namespace

void prepare_sample_select(int32_t vocab_size) {
  const int bytes = select_slice_size(vocab_size) * static_cast<int>(sizeof(float));
  const cudaError_t error =
      cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) cudaGetLastError();
  check(error == cudaSuccess, "a vocabulary of ", vocab_size,
        " tokens is larger than sampling on a GPU can take; use --device cpu");
}

void run_sample_select(const SampleParams& params, cudaStream_t stream) {
  const dim3 grid(kBlocks, static_cast<unsigned>(params.num_rows));
  const size_t bytes = static_cast<size_t>(select_slice_size(params.vocab_size)) * sizeof(float);
  select_kernel<<<grid, kThreads, bytes, stream>>>(params);
  RODIN_CHECK_LAUNCH("select_kernel");
}

}  // namespace rodin::cuda
