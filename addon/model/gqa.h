// Grouped-query attention of one layer.
#pragma once

#include "ops/ops.h"

namespace rodin {

struct GqaBuffers {
  Tensor q;          // [T, A * D]
  Tensor kv;         // [T, 2 * G * D] keys, then values
  Tensor attention;  // [T, A * D]
  Tensor angles;     // [T, D] filled by rope_table
};

// out [T, H] from the normed hidden states x [T, H]; writes this step's keys and values to the cache.
void run_gqa(Ops& ops, const GqaWeights& gqa, const Tensor& x, const StepIndex& index,
             const CacheLayer& cache, const GqaBuffers& at, const Tensor& out);

}  // namespace rodin
