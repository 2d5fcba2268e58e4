// One op of the forward at one shape, timed apart and compared with the oracle.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend.h"
#include "model/spec.h"

namespace rodin {

enum class BenchedOp : uint8_t { kNorm, kLinear, kMoe, kAttention };

struct OpCase {
  BenchedOp op = BenchedOp::kLinear;
  int64_t num_tokens = 0;  // T; attention: one of each of so many sequences
  Dtype dtype = Dtype::kBF16;
  int64_t cols = 0;        // norm: the row's length; linear: K
  int64_t rows = 0;        // linear: N
  ModelSpec spec;          // MoE and attention: the layer's shape
  int64_t context = 0;     // attention: positions of every sequence
  double min_seconds = 0;  // time spent on measuring, at least
};

struct OpTiming {
  std::vector<double> micros;  // of one call, mean of a run of calls each; rising
  double relative_error = 0;   // |out - oracle| / |oracle|, of the tokens that the oracle computed
  int64_t copies = 0;          // sets of weights and caches used in turn, so that no cache holds them
};

// Weights are synthetic, inputs normal. Throws std::runtime_error with one sentence.
OpTiming time_op(const BackendOptions& backend, const OpCase& op_case);

}  // namespace rodin
