#include "ops/cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/cpu/sample_filter.h"
#include "ops/noise.h"

namespace rodin {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kNumLanes = 16;
constexpr int kBlocksPerChunk = 64;  // Philox blocks of 4 tokens whose noise is made together

bool all_finite(const float* x, int64_t n) {
  uint32_t found[kNumLanes] = {};  // [kNumLanes]
  int64_t i = 0;
  for (; i + kNumLanes <= n; i += kNumLanes) {
    for (int lane = 0; lane < kNumLanes; ++lane) found[lane] |= !(std::fabs(x[i + lane]) < kInfinity);
  }
  uint32_t any = 0;
  for (uint32_t lane : found) any |= lane;
  for (; i < n; ++i) any |= !(std::fabs(x[i]) < kInfinity);
  return any == 0;
}

float largest(const float* x, int64_t n) {
  float lanes[kNumLanes];  // [kNumLanes]
  for (float& lane : lanes) lane = -kInfinity;
  int64_t i = 0;
  for (; i + kNumLanes <= n; i += kNumLanes) {
    for (int lane = 0; lane < kNumLanes; ++lane)
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  }
  float best = -kInfinity;
  for (float lane : lanes) best = lane > best ? lane : best;
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// log(sum(exp(x))), summed in one fixed order.
double log_sum_exp(const float* x, int64_t n, float max) {
  double lanes[kNumLanes] = {};  // [kNumLanes]
  for (int64_t i = 0; i < n; ++i) lanes[i % kNumLanes] += static_cast<double>(exp_non_positive(x[i] - max));
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return static_cast<double>(max) + std::log(sum);
}

// The k likeliest ids of a row, by falling logit, ties to the lower id; `ids` has room for the vocabulary.
void select_likeliest(const float* x, int64_t n, int64_t k, int32_t* ids) {
  const auto likelier = [x](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; };
  for (int64_t i = 0; i < k; ++i) ids[i] = static_cast<int32_t>(i);
  std::make_heap(ids, ids + k, likelier);  // the least likely of them on top
  for (int64_t i = k; i < n; ++i) {
    if (!(x[i] > x[ids[0]])) continue;  // a tie goes to the lower id, which is in already
    std::pop_heap(ids, ids + k, likelier);
    ids[k - 1] = static_cast<int32_t>(i);
    std::push_heap(ids, ids + k, likelier);
  }
  std::sort(ids, ids + k, likelier);
}

void apply_bias_and_penalties(const SampleBatch& batch, int32_t seq, float* z) {
  const auto s = static_cast<size_t>(seq);
  for (int32_t i = batch.bias_start[s]; i < batch.bias_start[s + 1]; ++i) {
    z[batch.bias_ids[static_cast<size_t>(i)]] += batch.bias_values[static_cast<size_t>(i)];
  }
  const float repetition = batch.repetition_penalty[s];
  for (int32_t i = batch.history_start[s]; i < batch.history_start[s + 1]; ++i) {
    float& logit = z[batch.history_ids[static_cast<size_t>(i)]];
    const int32_t count = batch.history_counts[static_cast<size_t>(i)];
    if (repetition != 1) logit = logit > 0 ? logit / repetition : logit * repetition;
    logit -= batch.frequency_penalty[s] * static_cast<float>(count);
    if (count > 0) logit -= batch.presence_penalty[s];
  }
}

// Bans what the sequence's mask does not allow.
void apply_mask(const SampleBatch& batch, size_t seq, int64_t vocab_size, float* z) {
  const int32_t* words = batch.masks.data() + batch.mask_start[seq];
  for (int64_t id = 0; id < vocab_size; ++id) {
    const auto word = static_cast<uint32_t>(words[id / 32]);
    z[id] = (word >> (id % 32)) & 1 ? z[id] : -kInfinity;
  }
}

// Noise of the tokens first_id .. first_id + 4 * kBlocksPerChunk - 1; first_id is a multiple of 4. The same
// words as philox4x32, block by block in each round, so that the compiler makes vectors of them.
void fill_noise(uint32_t seed_low, uint32_t seed_high, int32_t position, int64_t first_id, float* out) {
  uint32_t c[4][kBlocksPerChunk];  // [4, kBlocksPerChunk]
  for (int b = 0; b < kBlocksPerChunk; ++b) {
    c[0][b] = static_cast<uint32_t>(position);
    c[1][b] = static_cast<uint32_t>(first_id / 4 + b);
    c[2][b] = 0;
    c[3][b] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int b = 0; b < kBlocksPerChunk; ++b) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * c[0][b];
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * c[2][b];
      c[0][b] = static_cast<uint32_t>(product1 >> 32) ^ c[1][b] ^ seed_low;
      c[2][b] = static_cast<uint32_t>(product0 >> 32) ^ c[3][b] ^ seed_high;
      c[1][b] = static_cast<uint32_t>(product1);
      c[3][b] = static_cast<uint32_t>(product0);
    }
    seed_low += 0x9E3779B9u;
    seed_high += 0xBB67AE85u;
  }
  uint32_t bits[4 * kBlocksPerChunk];  // [4 * kBlocksPerChunk]
  for (int b = 0; b < kBlocksPerChunk; ++b) {
    for (int word = 0; word < 4; ++word) bits[4 * b + word] = c[word][b];
  }
  for (int i = 0; i < 4 * kBlocksPerChunk; ++i) out[i] = noise::gumbel(bits[i]);
}

class RowSampler {
 public:
  RowSampler(const SampleArgs& args, int64_t row, int worker)
      : args_(args),
        row_(static_cast<size_t>(row)),
        seq_(static_cast<size_t>(args.row_seq[row])),
        logits_(args.logits + row * args.vocab_size),
        scores_(args.scratch->scores.data() + worker * args.vocab_size),
        weights_(args.scratch->weights.data() + worker * args.vocab_size),
        ids_(args.scratch->ids.data() + worker * args.vocab_size) {}

  void run() {
    SampleResult& result = *args_.result;
    const int32_t id = all_finite(logits_, args_.vocab_size) ? sample() : -1;
    result.sampled_ids[row_] = id;
    result.non_finite[row_] = id < 0;
    if (id >= 0 && args_.batch->num_logprobs[seq_] >= 0) {
      write_logprobs(id);
    } else {
      write_no_logprobs();
    }
  }

 private:
  // The sampled id, or -1 where no token has a finite largest logit.
  int32_t sample() {
    const SampleBatch& batch = *args_.batch;
    const int64_t n = args_.vocab_size;
    const float* z = logits_;
    const bool is_masked = batch.mask_start[seq_] != batch.mask_start[seq_ + 1];
    if (is_masked || batch.bias_start[seq_] != batch.bias_start[seq_ + 1] ||
        batch.history_start[seq_] != batch.history_start[seq_ + 1]) {
      std::copy_n(logits_, n, scores_);
      apply_bias_and_penalties(batch, static_cast<int32_t>(seq_), scores_);
      if (is_masked) apply_mask(batch, seq_, n, scores_);
      z = scores_;
    }
    const float max = largest(z, n);
    if (!(std::fabs(max) < kInfinity)) return -1;
    const float temperature = batch.temperature[seq_];
    if (temperature == 0) return static_cast<int32_t>(std::find(z, z + n, max) - z);

    for (int64_t i = 0; i < n; ++i) scores_[i] = (z[i] - max) / temperature;
    const SampleFilter filter = {batch.min_p[seq_], batch.top_k[seq_], batch.top_p[seq_]};
    return filter.is_off() ? noisiest_of_all() : noisiest_of_filtered(filter);
  }

  int32_t noisiest_of_all() const {
    float noise[4 * kBlocksPerChunk];  // [4 * kBlocksPerChunk]
    float best = -kInfinity;
    int64_t best_id = -1;
    for (int64_t first = 0; first < args_.vocab_size; first += 4 * kBlocksPerChunk) {
      fill_noise(seed_low(), seed_high(), args_.row_position[row_], first, noise);
      const int64_t count = std::min<int64_t>(4 * kBlocksPerChunk, args_.vocab_size - first);
      for (int64_t i = 0; i < count; ++i) noise[i] = scores_[first + i] + noise[i];
      const float chunk_best = largest(noise, count);
      if (chunk_best > best) {
        best = chunk_best;
        best_id = first + (std::find(noise, noise + count, chunk_best) - noise);
      }
    }
    return static_cast<int32_t>(best_id);
  }

  int32_t noisiest_of_filtered(const SampleFilter& filter) const {
    const int64_t n = filter_scores(filter, scores_, args_.vocab_size, weights_, ids_);
    float best = -kInfinity;
    int32_t best_id = -1;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t id = ids_[i];
      const float score = scores_[id] + gumbel_noise(seed_low(), seed_high(), args_.row_position[row_], id);
      if (score > best || (score == best && id < best_id)) {
        best = score;
        best_id = id;
      }
    }
    return best_id;
  }

  void write_logprobs(int32_t id) const {
    SampleResult& result = *args_.result;
    const int64_t n = args_.vocab_size;
    const double lse = log_sum_exp(logits_, n, largest(logits_, n));
    const auto logprob = [&](int32_t token) {
      return static_cast<float>(static_cast<double>(logits_[token]) - lse);
    };
    result.sampled_logprobs[row_] = logprob(id);
    const int64_t first = result.top_start[row_];
    const int64_t k = result.top_start[row_ + 1] - first;
    if (k == 0) return;
    select_likeliest(logits_, n, k, ids_);
    for (int64_t i = 0; i < k; ++i) {
      result.top_ids[static_cast<size_t>(first + i)] = ids_[i];
      result.top_logprobs[static_cast<size_t>(first + i)] = logprob(ids_[i]);
    }
  }

  void write_no_logprobs() const {
    SampleResult& result = *args_.result;
    result.sampled_logprobs[row_] = 0;
    for (int32_t i = result.top_start[row_]; i < result.top_start[row_ + 1]; ++i) {
      result.top_ids[static_cast<size_t>(i)] = -1;
      result.top_logprobs[static_cast<size_t>(i)] = 0;
    }
  }

  uint32_t seed_low() const { return args_.batch->seed_low[seq_]; }
  uint32_t seed_high() const { return args_.batch->seed_high[seq_]; }

  const SampleArgs& args_;
  const size_t row_;
  const size_t seq_;
  const float* logits_;  // [vocab_size]
  float* scores_;        // [vocab_size]
  float* weights_;       // [vocab_size]
  int32_t* ids_;         // [vocab_size]
};

}  // namespace

void sample_rows(ThreadPool& pool, const SampleArgs& args) {
  const auto num_rows = static_cast<size_t>(args.num_rows);
  SampleResult& result = *args.result;
  result.sampled_ids.resize(num_rows);
  result.sampled_logprobs.resize(num_rows);
  result.non_finite.resize(num_rows);
  result.top_start.resize(num_rows + 1);
  int64_t num_top = 0;
  for (size_t row = 0; row < num_rows; ++row) {
    result.top_start[row] = static_cast<int32_t>(num_top);
    const int32_t wanted = args.batch->num_logprobs[static_cast<size_t>(args.row_seq[row])];
    num_top += std::clamp<int64_t>(wanted, 0, args.vocab_size);
  }
  result.top_start[num_rows] = static_cast<int32_t>(num_top);
  result.top_ids.resize(static_cast<size_t>(num_top));
  result.top_logprobs.resize(static_cast<size_t>(num_top));
  pool.parallel_for(args.num_rows, [&](int64_t row, int worker) { RowSampler(args, row, worker).run(); });
}

}  // namespace rodin
