// Everything that comes from outside, checked before it is used: whatever passes here cannot make the model
// read or write out of bounds. Each function throws std::runtime_error with one sentence.
#pragma once

#include "engine/runner.h"
#include "engine/step.h"

namespace rodin {

// Sizes, threads and names; the spec and the tensor table are checked where they are used.
void validate_options(const RunnerOptions& options);

// Lengths, ids, positions, slots, ranges and sampling values of a batch.
void validate_batch(const StepBatch& batch, const RunnerOptions& options);

}  // namespace rodin
