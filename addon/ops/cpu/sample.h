// Sampling on the CPU: every sampled row of a step, and its log-probabilities, as ops/sample_args.h defines
// them.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/cpu/thread_pool.h"
#include "ops/sample_args.h"

namespace rodin {

// Working memory of sample_rows, made once.
struct SampleScratch {
  SampleScratch(int64_t vocab_size, int num_workers)
      : vocab_size(vocab_size),
        scores(static_cast<size_t>(vocab_size * num_workers)),
        weights(static_cast<size_t>(vocab_size * num_workers)),
        ids(static_cast<size_t>(vocab_size * num_workers)) {}

  int64_t bytes() const { return static_cast<int64_t>((scores.size() + weights.size() + ids.size()) * 4); }

  int64_t vocab_size;
  std::vector<float> scores;   // [num_workers, vocab_size]
  std::vector<float> weights;  // [num_workers, vocab_size]
  std::vector<int32_t> ids;    // [num_workers, vocab_size]
};

void sample_rows(ThreadPool& pool, const SampleArgs& args);

}  // namespace rodin
