// Grouped-query attention, one query head and one query at a time.
#include <cmath>
#include <cstring>
#include <limits>

#include "ops/cpu/reference_ops.h"

namespace rodin {

void ReferenceOps::gqa_rope_store(const Tensor& q, const Tensor& kv, const GqaShape& shape,
                                  const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache) {
  const int64_t dim = shape.head_dim;
  for (int64_t t = 0; t < index.num_tokens; ++t) {
    const float* angles = rope_table.row<float>(t);
    for (int64_t h = 0; h < shape.num_heads; ++h) apply_rope(q.row<float>(t) + h * dim, angles, dim, false);
    for (int64_t g = 0; g < shape.num_kv_heads; ++g) {
      apply_rope(kv.row<float>(t) + g * dim, angles, dim, false);
    }
    if (index.slots[t] < 0) continue;
    memcpy(cache.latents.row<float>(index.slots[t]), kv.row<float>(t),
           static_cast<size_t>(shape.row_dim()) * sizeof(float));
  }
}

void ReferenceOps::gqa_attention(const Tensor& q, const GqaShape& shape, const StepIndex& index,
                                 const CacheLayer& cache, const Tensor& out) {
  const int64_t dim = shape.head_dim;
  pool_.parallel_for(index.num_tokens * shape.num_heads, [&](int64_t task, int) {
    const int64_t t = task / shape.num_heads;
    const int64_t head = task % shape.num_heads;
    const int64_t key_at = head / shape.group_size() * dim;
    const int64_t value_at = shape.kv_dim() + key_at;
    const int64_t end = index.cache_positions[t] + 1;
    const float* query = q.row<float>(t) + head * dim;
    const auto row_of = [&](int64_t p) {
      return cache.latents.row<float>(slot_of(index, index.seq_of_token[t], p));
    };

    std::vector<float> scores(static_cast<size_t>(end));  // [end]
    float max = -std::numeric_limits<float>::infinity();
    for (int64_t p = index.first_position; p < end; ++p) {
      const float score = dot_product(query, row_of(p) + key_at, dim) * shape.softmax_scale;
      scores[static_cast<size_t>(p)] = score;
      if (score > max) max = score;
    }
    std::vector<double> sums(static_cast<size_t>(dim));  // [D]
    double total = 0;
    for (int64_t p = index.first_position; p < end; ++p) {
      const double weight = std::exp(scores[static_cast<size_t>(p)] - max);
      const float* value = row_of(p) + value_at;
      total += weight;
      for (int64_t i = 0; i < dim; ++i) sums[static_cast<size_t>(i)] += weight * value[i];
    }
    float* to = out.row<float>(t) + head * dim;
    for (int64_t i = 0; i < dim; ++i) to[i] = static_cast<float>(sums[static_cast<size_t>(i)] / total);
  });
}

}  // namespace rodin
