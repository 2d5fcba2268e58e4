// Which sequences of a step attend in the naive form (mla_prefill.cu), decided on the host before any layer
// runs.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/quantized.h"
#include "ops/ops.h"

namespace rodin::cuda {

struct MlaPrefillPlan {
  std::vector<PrefillTile> tiles;  // [num_tiles]
  // [num_keys] of the latents, one sequence after the other; each fills up its last kPrefillKeys with its
  // last key, since a weight of 0 times another sequence's value need not be 0.
  std::vector<int32_t> slots;
  std::vector<char> is_prefill;  // [S]

  // Takes the sequences of at least `min_tokens` tokens whose keys fit into max_keys rows, the first ones
  // first. max_keys 0: none.
  void fill(const StepIndex& host, int64_t min_tokens, int64_t max_keys);
};

}  // namespace rodin::cuda
