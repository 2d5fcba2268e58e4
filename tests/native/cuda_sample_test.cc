// CUDA: sampling gives the CPU's tokens, log-probabilities and likeliest tokens.
#include <limits>

#include "engine/step.h"
#include "ops/cpu/sample.h"
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

// Rows of every combination of settings; sequence s has row s.
SampleBatch random_batch(CudaRandom& random, int64_t num_rows, int64_t vocab_size) {
  SampleBatch batch;
  batch.history_start.push_back(0);
  batch.bias_start.push_back(0);
  batch.mask_start.push_back(0);
  for (int64_t r = 0; r < num_rows; ++r) {
    const auto on = [&](int bit) { return (r >> bit & 1) != 0; };
    const float temperatures[4] = {0.0f, 0.3f, 1.0f, 2.5f};  // [4]
    batch.temperature.push_back(temperatures[random.below(4)]);
    batch.top_k.push_back(on(0) ? static_cast<int32_t>(1 + random.below(60)) : 0);
    batch.top_p.push_back(on(1) ? 0.05f + 0.94f * random.uniform() : 1.0f);
    batch.min_p.push_back(on(2) ? 0.3f * random.uniform() : 0.0f);
    batch.seed_low.push_back(random.next());
    batch.seed_high.push_back(random.next());
    const bool has_penalty = on(3);
    batch.presence_penalty.push_back(has_penalty ? 0.7f : 0.0f);
    batch.frequency_penalty.push_back(has_penalty ? 0.25f : 0.0f);
    batch.repetition_penalty.push_back(has_penalty ? 1.3f : 1.0f);
    if (has_penalty) {
      for (int64_t id = random.below(5); id < vocab_size; id += 1 + random.below(30)) {
        batch.history_ids.push_back(static_cast<int32_t>(id));
        batch.history_counts.push_back(static_cast<int32_t>(random.below(4)));
      }
    }
    batch.history_start.push_back(static_cast<int32_t>(batch.history_ids.size()));
    if (on(4)) {
      for (int64_t id = random.below(7); id < vocab_size; id += 1 + random.below(200)) {
        batch.bias_ids.push_back(static_cast<int32_t>(id));
        batch.bias_values.push_back(random.below(4) == 0 ? -std::numeric_limits<float>::infinity()
                                                         : random.normal());
      }
    }
    batch.bias_start.push_back(static_cast<int32_t>(batch.bias_ids.size()));
    if (random.below(3) == 0) {
      for (int64_t word = 0; word < (vocab_size + 31) / 32; ++word) {
        batch.masks.push_back(static_cast<int32_t>(random.next() & random.next()) | 1);
      }
    }
    batch.mask_start.push_back(static_cast<int32_t>(batch.masks.size()));
    const int32_t asked[5] = {-1, 0, 1, 5, 20};  // [5]
    batch.num_logprobs.push_back(asked[random.below(5)]);
  }
  return batch;
}

struct Outcome {
  SampleResult cpu, gpu;
};

Outcome sample_both(Ops& gpu, const SampleBatch& batch, const Floats& logits, int64_t vocab_size) {
  const auto num_rows = static_cast<int64_t>(batch.temperature.size());
  std::vector<int32_t> row_seq, positions;
  for (int64_t r = 0; r < num_rows; ++r) {
    row_seq.push_back(static_cast<int32_t>(r));
    positions.push_back(static_cast<int32_t>(100 + 7 * r));
  }
  ThreadPool pool(4);
  SampleScratch scratch(vocab_size, 4);
  Outcome outcome;
  SampleArgs args;
  args.batch = &batch;
  args.logits = logits.data();
  args.row_seq = row_seq.data();
  args.row_position = positions.data();
  args.num_rows = num_rows;
  args.vocab_size = vocab_size;
  args.scratch = &scratch;
  args.result = &outcome.cpu;
  sample_rows(pool, args);
  const DeviceMatrix device_logits(gpu, logits, num_rows, vocab_size, Dtype::kF32);
  args.logits = device_logits.tensor().row<float>(0);
  args.result = &outcome.gpu;
  gpu.sample(args);
  const std::vector<uint8_t> after = device_logits.raw();
  CHECK(memcmp(after.data(), logits.data(), after.size()) == 0);
  return outcome;
}

void check_equal_outcome(const Outcome& outcome) {
  const SampleResult &cpu = outcome.cpu, &gpu = outcome.gpu;
  CHECK_EQ(gpu.sampled_ids.size(), cpu.sampled_ids.size());
  for (size_t r = 0; r < cpu.sampled_ids.size(); ++r) {
    CHECK_EQ(gpu.sampled_ids[r], cpu.sampled_ids[r]);
    CHECK_EQ(int{gpu.non_finite[r]}, int{cpu.non_finite[r]});
    CHECK_CLOSE(gpu.sampled_logprobs[r], cpu.sampled_logprobs[r],
                1e-6 * (1 + std::fabs(cpu.sampled_logprobs[r])));
  }
  CHECK(gpu.top_start == cpu.top_start);
  CHECK(gpu.top_ids == cpu.top_ids);
  for (size_t i = 0; i < cpu.top_logprobs.size(); ++i) {
    CHECK_CLOSE(gpu.top_logprobs[i], cpu.top_logprobs[i], 1e-6 * (1 + std::fabs(cpu.top_logprobs[i])));
  }
}

const bool random_test = add_cuda_test("sample as the CPU does", [] {
  CudaRandom random{8};
  const std::unique_ptr<Ops> gpu = make_gpu();
  OpsLimits limits = test_limits(small_mla());
  limits.vocab_size = 163840;
  gpu->reserve(limits);
  for (const int64_t vocab_size : {1, 3, 16, 33, 97, 1031, 4096, 4097, 16384, 129280, 163840}) {
    for (int round = 0; round < 3; ++round) {
      const int64_t num_rows = vocab_size > 100000 ? 32 : 64 - round;
      const SampleBatch batch = random_batch(random, num_rows, vocab_size);
      Floats logits = random_floats(random, num_rows * vocab_size, round == 0 ? 2.0f : 6.0f);
      if (round == 2) {  // many ties
        for (float& logit : logits) logit = std::round(logit);
      }
      check_equal_outcome(sample_both(*gpu, batch, logits, vocab_size));
    }
  }
});

const bool special_test = add_cuda_test("sample: NaN, infinity, all banned, every log-probability", [] {
  CudaRandom random{9};
  const std::unique_ptr<Ops> gpu = make_gpu();
  gpu->reserve(test_limits(small_mla()));
  const int64_t vocab_size = 5001, num_rows = 8;
  SampleBatch batch = random_batch(random, num_rows, vocab_size);
  for (size_t r = 0; r < 8; ++r) batch.num_logprobs[r] = 3;
  Floats logits = random_floats(random, num_rows * vocab_size, 3);
  logits[4999] = std::nanf("");
  logits[static_cast<size_t>(vocab_size)] = std::numeric_limits<float>::infinity();
  logits[static_cast<size_t>(3 * vocab_size - 1)] = -std::numeric_limits<float>::infinity();
  batch.num_logprobs[5] = static_cast<int32_t>(vocab_size);
  batch.num_logprobs[6] = 1024;
  batch.num_logprobs[7] = 1025;
  for (int32_t id = 0; id < vocab_size; ++id) {  // row 7: everything banned
    batch.bias_ids.push_back(id);
    batch.bias_values.push_back(-std::numeric_limits<float>::infinity());
  }
  batch.bias_start[8] = static_cast<int32_t>(batch.bias_ids.size());
  const Outcome outcome = sample_both(*gpu, batch, logits, vocab_size);
  for (const size_t bad : {0, 1, 2, 7}) CHECK_EQ(outcome.gpu.sampled_ids[bad], -1);
  check_equal_outcome(outcome);
});

}  // namespace
}  // namespace rodin::test
