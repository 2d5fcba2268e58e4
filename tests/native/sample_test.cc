#include "ops/cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "ops/cpu/sample_filter.h"
#include "ops/noise.h"
#include "tests/native/test.h"

namespace rodin {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Small deterministic random numbers for the inputs.
struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33) * 2u + static_cast<uint32_t>(state >> 63);
  }
  double uniform() { return (next() + 0.5) * 0x1p-32; }
  float normal() {
    return static_cast<float>(std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()));
  }
};

// Greedy sequences of one sampled row each, nothing asked for.
SampleBatch make_batch(size_t num_seqs) {
  SampleBatch batch;
  batch.temperature.assign(num_seqs, 0);
  batch.top_p.assign(num_seqs, 1);
  batch.top_k.assign(num_seqs, 0);
  batch.min_p.assign(num_seqs, 0);
  batch.seed_low.assign(num_seqs, 0);
  batch.seed_high.assign(num_seqs, 0);
  batch.presence_penalty.assign(num_seqs, 0);
  batch.frequency_penalty.assign(num_seqs, 0);
  batch.repetition_penalty.assign(num_seqs, 1);
  batch.num_logprobs.assign(num_seqs, -1);
  batch.history_start.assign(num_seqs + 1, 0);
  batch.bias_start.assign(num_seqs + 1, 0);
  batch.mask_start.assign(num_seqs + 1, 0);
  return batch;
}

// One row per sequence, row r sampling position positions[r].
SampleResult sample(const SampleBatch& batch, const std::vector<float>& logits,
                    const std::vector<int32_t>& positions, int num_threads = 2) {
  const auto num_rows = static_cast<int64_t>(positions.size());
  std::vector<int32_t> row_seq(positions.size());  // [R]
  std::iota(row_seq.begin(), row_seq.end(), 0);
  ThreadPool pool(num_threads);
  SampleScratch scratch(static_cast<int64_t>(logits.size()) / num_rows, num_threads);
  SampleResult result;
  sample_rows(pool, {.batch = &batch,
                     .logits = logits.data(),
                     .row_seq = row_seq.data(),
                     .row_position = positions.data(),
                     .num_rows = num_rows,
                     .vocab_size = scratch.vocab_size,
                     .scratch = &scratch,
                     .result = &result});
  return result;
}

// The definition in ops/sample_args.h in double precision: survivors and their scores without noise.
struct Oracle {
  std::vector<double> score;   // [V]
  std::vector<bool> survives;  // [V]
  double mass_margin = 1;      // how far the masses of top_p stay from its limit

  Oracle(const SampleBatch& batch, size_t s, const float* x, int64_t vocab_size) {
    const auto n = static_cast<size_t>(vocab_size);
    std::vector<double> z(x, x + n);
    for (int32_t i = batch.bias_start[s]; i < batch.bias_start[s + 1]; ++i) {
      z[static_cast<size_t>(batch.bias_ids[static_cast<size_t>(i)])] +=
          batch.bias_values[static_cast<size_t>(i)];
    }
    for (int32_t i = batch.history_start[s]; i < batch.history_start[s + 1]; ++i) {
      double& logit = z[static_cast<size_t>(batch.history_ids[static_cast<size_t>(i)])];
      const int32_t count = batch.history_counts[static_cast<size_t>(i)];
      logit = logit > 0 ? logit / batch.repetition_penalty[s] : logit * batch.repetition_penalty[s];
      logit -=
          double{batch.frequency_penalty[s]} * count + (count > 0 ? double{batch.presence_penalty[s]} : 0.0);
    }
    const double max = *std::max_element(z.begin(), z.end());
    const double temperature = batch.temperature[s] == 0 ? 1.0 : double{batch.temperature[s]};
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; ++i) {
      score.push_back((z[i] - max) / temperature);
      order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return score[a] > score[b]; });
    if (batch.min_p[s] > 0) {
      std::erase_if(order, [&](size_t i) { return score[i] < std::log(double{batch.min_p[s]}); });
    }
    if (batch.top_k[s] > 0 && order.size() > static_cast<size_t>(batch.top_k[s])) {
      order.resize(static_cast<size_t>(batch.top_k[s]));
    }
    if (batch.top_p[s] < 1) {
      double total = 0, reached = 0;
      for (size_t i : order) total += std::exp(score[i]);
      size_t kept = 0;
      while (kept < order.size() && reached < double{batch.top_p[s]} * total) {
        reached += std::exp(score[order[kept++]]);
        mass_margin = std::min(mass_margin, std::abs(reached / total - double{batch.top_p[s]}));
      }
      order.resize(kept);
    }
    survives.assign(n, false);
    for (size_t i : order) survives[i] = score[i] > -std::numeric_limits<double>::infinity();
  }
};

TEST("sample: greedy takes the largest, ties to the lower id") {
  SampleBatch batch = make_batch(3);
  const std::vector<float> logits = {1, 5, 5, 2, -1, -3, -1, -2, 0, 0, 0, 7};
  const SampleResult result = sample(batch, logits, {4, 9, 2});
  CHECK_EQ(result.sampled_ids[0], 1);
  CHECK_EQ(result.sampled_ids[1], 0);
  CHECK_EQ(result.sampled_ids[2], 3);
  CHECK_EQ(result.sampled_logprobs[0], 0.0f);
  CHECK_EQ(result.top_start[3], 0);
}

// Every combination of filters, penalties, bias and temperature against the oracle, over vocabulary sizes
// that are no multiple of anything.
TEST("sample: agrees with the double-precision oracle") {
  Random random{42};
  int num_close = 0, num_rows = 0;
  for (const int64_t vocab_size : {1, 3, 16, 97, 257, 1024, 5001}) {
    for (int variant = 0; variant < 96; ++variant) {
      SampleBatch batch = make_batch(1);
      batch.temperature[0] = std::vector<float>{0.0f, 0.3f, 1.0f, 2.5f}[variant % 4];
      if (variant & 4) batch.top_k[0] = 1 + static_cast<int32_t>(random.next() % 60);
      if (variant & 8) batch.top_p[0] = 0.05f + 0.94f * static_cast<float>(random.uniform());
      if (variant & 16) batch.min_p[0] = 0.3f * static_cast<float>(random.uniform());
      if (variant >= 32) {
        batch.repetition_penalty[0] = 1.3f;
        batch.presence_penalty[0] = 0.7f;
        batch.frequency_penalty[0] = 0.25f;
        for (int32_t id = 0; id < vocab_size; id += 1 + static_cast<int32_t>(random.next() % 7)) {
          batch.history_ids.push_back(id);
          batch.history_counts.push_back(static_cast<int32_t>(random.next() % 4));
        }
        batch.history_start[1] = static_cast<int32_t>(batch.history_ids.size());
      }
      if (variant >= 64) {
        for (int32_t id = 1; id < vocab_size; id += 1 + static_cast<int32_t>(random.next() % 11)) {
          batch.bias_ids.push_back(id);
          batch.bias_values.push_back(random.next() % 3 == 0 ? -kInfinity : 4 * random.normal());
        }
        batch.bias_start[1] = static_cast<int32_t>(batch.bias_ids.size());
      }
      batch.seed_low[0] = random.next();
      batch.seed_high[0] = random.next();
      const auto position = static_cast<int32_t>(random.next() % 100000);
      std::vector<float> logits(static_cast<size_t>(vocab_size));  // [V]
      for (float& x : logits) x = 3 * random.normal();

      const int32_t id = sample(batch, logits, {position}).sampled_ids[0];
      const Oracle oracle(batch, 0, logits.data(), vocab_size);
      CHECK(id >= 0 && id < vocab_size);
      ++num_rows;
      if (oracle.mass_margin < 1e-5) {  // the last survivor is a matter of rounding
        ++num_close;
        continue;
      }
      CHECK(oracle.survives[static_cast<size_t>(id)]);
      const auto noisy = [&](int32_t i) {
        const double noise = batch.temperature[0] == 0
                                 ? 0.0
                                 : double{gumbel_noise(batch.seed_low[0], batch.seed_high[0], position, i)};
        return oracle.score[static_cast<size_t>(i)] + noise;
      };
      for (int32_t other = 0; other < vocab_size; ++other) {
        if (oracle.survives[static_cast<size_t>(other)]) CHECK(noisy(other) <= noisy(id) + 1e-5);
      }
    }
  }
  CHECK(num_close * 50 < num_rows);
}

TEST("sample: filters keep exactly the oracle's survivors") {
  Random random{7};
  for (int round = 0; round < 300; ++round) {
    const int64_t vocab_size = 2 + random.next() % 3000;
    SampleBatch batch = make_batch(1);
    batch.temperature[0] = 1;
    if (round % 3 != 0) batch.top_p[0] = static_cast<float>(random.uniform());
    if (round % 2 != 0) batch.top_k[0] = 1 + static_cast<int32_t>(random.next() % 400);
    if (round % 5 == 0) batch.min_p[0] = 0.1f * static_cast<float>(random.uniform());
    std::vector<float> scores(static_cast<size_t>(vocab_size));  // [V]
    // Coarse values make many ties, which only ids can break.
    for (float& x : scores) x = round % 4 == 0 ? std::round(2 * random.normal()) : 5 * random.normal();
    const float max = *std::max_element(scores.begin(), scores.end());
    for (float& x : scores) x -= max;
    const Oracle oracle(batch, 0, scores.data(), vocab_size);
    if (oracle.mass_margin < 1e-6) continue;
    std::vector<float> weights(scores.size());  // [V]
    std::vector<int32_t> ids(scores.size());    // [V]
    const int64_t n = filter_scores({batch.min_p[0], batch.top_k[0], batch.top_p[0]}, scores.data(),
                                    vocab_size, weights.data(), ids.data());
    std::vector<bool> kept(scores.size(), false);
    for (int64_t i = 0; i < n; ++i) kept[static_cast<size_t>(ids[static_cast<size_t>(i)])] = true;
    CHECK(kept == oracle.survives);
  }
}

TEST("sample: exp of the filters is within 2e-7") {
  for (int i = 0; i < 100000; ++i) {
    const float x = -87.0f * static_cast<float>(i) / 100000.0f;
    CHECK_CLOSE(exp_non_positive(x), std::exp(double{x}), 2e-7 * std::exp(double{x}));
  }
  CHECK_EQ(exp_non_positive(0), 1.0f);
  CHECK_EQ(exp_non_positive(-kInfinity), 0.0f);
}

TEST("sample: frequencies at temperature 0.8 are those of the softmax") {
  const size_t vocab_size = 8, num_rows = 40000;
  const std::vector<float> row = {0.0f, 1.0f, -1.0f, 2.0f, 0.5f, -3.0f, 1.5f, -0.5f};  // [V]
  SampleBatch batch = make_batch(num_rows);
  std::vector<float> logits;       // [R, V]
  std::vector<int32_t> positions;  // [R]
  for (size_t r = 0; r < num_rows; ++r) {
    batch.temperature[r] = 0.8f;
    batch.seed_low[r] = static_cast<uint32_t>(r % 200);
    positions.push_back(static_cast<int32_t>(r / 200));
    logits.insert(logits.end(), row.begin(), row.end());
  }
  const SampleResult result = sample(batch, logits, positions);
  std::vector<double> counts(vocab_size);  // [V]
  for (int32_t id : result.sampled_ids) counts[static_cast<size_t>(id)] += 1;
  double total = 0, chi2 = 0;
  for (float x : row) total += std::exp(x / 0.8);
  for (size_t i = 0; i < vocab_size; ++i) {
    const double expected = num_rows * std::exp(row[i] / 0.8) / total;
    chi2 += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  CHECK(chi2 < 24.3);  // 7 degrees of freedom, p = 0.001
}

TEST("sample: a row does not depend on the rows beside it nor on the threads") {
  Random random{3};
  const size_t num_rows = 33, vocab_size = 1003;
  SampleBatch batch = make_batch(num_rows);
  std::vector<float> logits(num_rows * vocab_size);  // [R, V]
  for (float& x : logits) x = 2 * random.normal();
  std::vector<int32_t> positions(num_rows);  // [R]
  for (size_t r = 0; r < num_rows; ++r) {
    batch.temperature[r] = r % 3 == 0 ? 0.0f : 0.9f;
    batch.top_p[r] = r % 2 == 0 ? 1.0f : 0.9f;
    batch.seed_low[r] = static_cast<uint32_t>(r);
    batch.num_logprobs[r] = static_cast<int32_t>(r % 5) - 1;
    positions[r] = static_cast<int32_t>(r * 7);
  }
  const SampleResult together = sample(batch, logits, positions, 4);
  for (size_t r = 0; r < num_rows; ++r) {
    SampleBatch alone = make_batch(1);
    alone.temperature[0] = batch.temperature[r];
    alone.top_p[0] = batch.top_p[r];
    alone.seed_low[0] = batch.seed_low[r];
    alone.num_logprobs[0] = batch.num_logprobs[r];
    const auto first = logits.begin() + static_cast<ptrdiff_t>(r * vocab_size);
    const SampleResult one = sample(alone, {first, first + vocab_size}, {positions[r]}, 1);
    CHECK_EQ(one.sampled_ids[0], together.sampled_ids[r]);
    CHECK_EQ(one.sampled_logprobs[0], together.sampled_logprobs[r]);
    for (int32_t i = 0; i < one.top_start[1]; ++i) {
      const auto j = static_cast<size_t>(together.top_start[r] + i);
      CHECK_EQ(one.top_ids[static_cast<size_t>(i)], together.top_ids[j]);
      CHECK_EQ(one.top_logprobs[static_cast<size_t>(i)], together.top_logprobs[j]);
    }
  }
}

TEST("sample: log-probabilities are of the raw logits, likeliest first, ties by id") {
  SampleBatch batch = make_batch(1);
  batch.num_logprobs[0] = 4;
  batch.bias_ids = {1};
  batch.bias_values = {-kInfinity};  // the likeliest is banned, but its log-probability is reported
  batch.bias_start = {0, 1};
  const std::vector<float> logits = {1, 9, 3, 3, 8, -2};
  const SampleResult result = sample(batch, logits, {0});
  double total = 0;
  for (float x : logits) total += std::exp(double{x});
  CHECK_EQ(result.sampled_ids[0], 4);
  CHECK_CLOSE(result.sampled_logprobs[0], 8 - std::log(total), 1e-6);
  CHECK_EQ(result.top_start[1], 4);
  const std::vector<int32_t> expected = {1, 4, 2, 3};
  for (size_t i = 0; i < 4; ++i) {
    CHECK_EQ(result.top_ids[i], expected[i]);
    CHECK_CLOSE(result.top_logprobs[i], double{logits[static_cast<size_t>(expected[i])]} - std::log(total),
                1e-6);
  }
}

TEST("sample: log-probabilities of a whole vocabulary sum to 1") {
  Random random{11};
  const int32_t vocab_size = 999;
  SampleBatch batch = make_batch(1);
  batch.num_logprobs[0] = vocab_size;
  std::vector<float> logits(vocab_size);  // [V]
  for (float& x : logits) x = 4 * random.normal();
  const SampleResult result = sample(batch, logits, {0});
  double sum = 0;
  for (size_t i = 0; i < vocab_size; ++i) {
    sum += std::exp(double{result.top_logprobs[i]});
    if (i > 0) CHECK(result.top_logprobs[i] <= result.top_logprobs[i - 1]);
  }
  CHECK_CLOSE(sum, 1.0, 1e-5);
}

TEST("sample: rows without a finite largest logit are marked and disturb nobody") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  SampleBatch batch = make_batch(5);
  batch.num_logprobs.assign(5, 2);
  batch.temperature.assign(5, 1);
  batch.bias_start = {0, 0, 0, 0, 3, 3};
  batch.bias_ids = {0, 1, 2};
  batch.bias_values = {-kInfinity, -kInfinity, -kInfinity};
  const std::vector<float> logits = {1, nan, 3, kInfinity, 1, 1, 1, -kInfinity, 2, 1, 2, 3, -50, -50, 90};
  const SampleResult result = sample(batch, logits, {1, 1, 1, 1, 1});
  for (size_t r = 0; r < 4; ++r) {
    CHECK_EQ(result.sampled_ids[r], -1);
    CHECK_EQ(int{result.non_finite[r]}, 1);
    CHECK_EQ(result.top_ids[2 * r], -1);
  }
  CHECK_EQ(result.sampled_ids[4], 2);
  CHECK_EQ(int{result.non_finite[4]}, 0);
  CHECK_EQ(result.top_ids[8], 2);
}

TEST("sample: only what the mask allows is sampled, whatever bias, penalty and filter say") {
  Random random{13};
  for (const int64_t vocab_size : {1, 31, 32, 33, 1000}) {
    for (int round = 0; round < 40; ++round) {
      SampleBatch batch = make_batch(2);
      const auto num_words = static_cast<size_t>((vocab_size + 31) / 32);
      const auto only = static_cast<int32_t>(random.next() % static_cast<uint32_t>(vocab_size));
      batch.masks.assign(num_words, 0);
      for (int64_t id = 0; id < vocab_size; ++id) {
        const bool is_allowed = round % 2 == 0 ? id == only : random.next() % 4 == 0 || id == only;
        if (is_allowed) batch.masks[static_cast<size_t>(id / 32)] |= static_cast<int32_t>(1u << (id % 32));
      }
      batch.mask_start = {0, 0, static_cast<int32_t>(num_words)};
      batch.temperature.assign(2, round % 3 == 0 ? 0.0f : 1.5f);
      batch.top_k[1] = round % 5;
      batch.num_logprobs.assign(2, 0);
      batch.seed_low.assign(2, random.next());
      std::vector<float> logits(static_cast<size_t>(2 * vocab_size));  // [R, V]
      for (float& x : logits) x = 9 * random.normal();
      std::copy_n(logits.begin(), vocab_size, logits.begin() + vocab_size);
      const SampleResult masked = sample(batch, logits, {3, 3});
      const int32_t id = masked.sampled_ids[1];
      CHECK(id >= 0 && id < vocab_size);
      CHECK((static_cast<uint32_t>(batch.masks[static_cast<size_t>(id / 32)]) >> (id % 32)) & 1);
      if (round % 2 == 0) CHECK_EQ(id, only);
      if (id == masked.sampled_ids[0]) CHECK_EQ(masked.sampled_logprobs[0], masked.sampled_logprobs[1]);
    }
  }
  SampleBatch batch = make_batch(1);
  batch.mask_start = {0, 1};
  batch.masks = {0};
  CHECK_EQ(int{sample(batch, {1, 2, 3}, {5}).non_finite[0]}, 1);
}

TEST("sample: extreme temperatures and penalties stay defined") {
  for (const float temperature : {1e-38f, 1e-10f, 1e10f, 3e38f}) {
    SampleBatch batch = make_batch(1);
    batch.temperature[0] = temperature;
    batch.top_p[0] = 0.5f;
    batch.min_p[0] = 1e-30f;
    const SampleResult result = sample(batch, {2, 1, 0, -1}, {5});
    CHECK(result.sampled_ids[0] >= 0 && result.sampled_ids[0] < 4);
    if (temperature < 1) CHECK_EQ(result.sampled_ids[0], 0);
  }
  SampleBatch batch = make_batch(1);
  batch.repetition_penalty[0] = 1e-38f;
  batch.history_ids = {0};
  batch.history_counts = {1};
  batch.history_start = {0, 1};
  CHECK_EQ(int{sample(batch, {1e6f, 1, 0}, {5}).non_finite[0]}, 1);
}

}  // namespace
}  // namespace rodin
