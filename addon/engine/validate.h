// Everything that comes from outside, checked before it is used: whatever passes here cannot make the model
// read or write out of bounds. Each function throws std::runtime_error with one sentence.
#pragma once

#include "engine/runner.h"
#include "engine/step.h"

namespace rodin {

// Sizes, threads and names; the spec and the tensor table are checked where they are used.
void validate_options(const RunnerOptions& options);

// Lengths, ids, positions, slots, ranges and sampling values of a batch. num_rows_before: rows that the step
// before samples, which token ids below 0 may name.
void validate_batch(const StepBatch& batch, const RunnerOptions& options, int64_t num_rows_before = 0);

}  // namespace rodin
