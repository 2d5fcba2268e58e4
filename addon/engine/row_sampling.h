// The sampling settings of single rows. A penalty at a row counts the tokens of the rows before it in the
// same step, which the batch's history does not hold: such a row is sampled as a sequence of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/sample_args.h"

namespace rodin {

class RowSampling {
 public:
  RowSampling() { clear(); }
  void clear();

  // Appends the settings of sequence `seq` of `batch`, with `num_more` tokens added to its history where it
  // has a penalty, and no log-probabilities unless `has_logprobs`. Returns the number of the new sequence.
  int32_t append(const SampleBatch& batch, int64_t seq, const int32_t* more, int64_t num_more,
                 bool has_logprobs);

  const SampleBatch& batch() const { return batch_; }

 private:
  void count(int32_t id, size_t history_begin);

  SampleBatch batch_;
};

// Whether what sequence `seq` may sample depends on the tokens before.
bool has_penalty(const SampleBatch& batch, int64_t seq);

}  // namespace rodin
