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
  std::vector<int32_t> slots;      // [num_keys] of the latents, one sequence after the other
  std::vector<char> is_prefill;    // [S]
  int64_t num_tokens = 0;

  // Takes the sequences of at least `min_tokens` tokens whose keys fit into max_keys rows, the first ones
  // first. max_keys 0: none.
  void fill(const StepIndex& host, int64_t min_tokens, int64_t max_keys);
};

}  // namespace rodin::cuda
