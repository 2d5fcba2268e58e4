// Multi-head latent attention in its naive form: keys and values of every head are expanded from the cached
// latents through kv_b_proj, then attention is the ordinary one.
#include <cmath>
#include <cstring>
#include <limits>

#include "ops/cpu/reference_ops.h"

namespace rodin {

void ReferenceOps::mla_rope_store(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                                  const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache) {
  const MlaShape& shape = mla.shape;
  const Tensor latent = kv.slice_cols(0, shape.lora_rank);
  rms_norm(latent, mla.kv_a_norm, eps, latent);
  for (int64_t t = 0; t < index.num_tokens; ++t) {
    const float* angles = rope_table.row<float>(t);
    for (int64_t head = 0; head < shape.num_heads; ++head) {
      float* rope_part = q.row<float>(t) + head * shape.qk_dim() + shape.nope_dim;
      apply_rope(rope_part, angles, shape.rope_dim, shape.rope_interleave);
    }
    apply_rope(kv.row<float>(t) + shape.lora_rank, angles, shape.rope_dim, shape.rope_interleave);
    if (index.slots[t] < 0) continue;
    memcpy(cache.latents.row<float>(index.slots[t]), kv.row<float>(t),
           static_cast<size_t>(shape.latent_dim()) * sizeof(float));
  }
}

void ReferenceOps::mla_attention(const Tensor& q, const MlaWeights& mla, const StepIndex& index,
                                 const CacheLayer& cache, const Tensor& out) {
  const int64_t num_heads = mla.shape.num_heads;
  pool_.parallel_for(index.num_seqs * num_heads, [&](int64_t task, int) {
    attend_head(task / num_heads, task % num_heads, q, mla, index, cache, out);
  });
}

void ReferenceOps::attend_head(int64_t seq, int64_t head, const Tensor& q, const MlaWeights& mla,
                               const StepIndex& index, const CacheLayer& cache, const Tensor& out) {
  const MlaShape& shape = mla.shape;
  const int64_t first_row = index.q_start[seq];
  const int64_t end_row = index.q_start[seq + 1];
  if (first_row == end_row) return;
  const int64_t num_keys = index.cache_positions[end_row - 1] + 1;
  const int64_t kv_dim = shape.nope_dim + shape.v_dim;

  // Rows head * kv_dim .. of kv_b, and what they make of every cached latent.
  std::vector<float> kv_b(static_cast<size_t>(kv_dim * shape.lora_rank));  // [nope_dim + v_dim, lora_rank]
  for (int64_t i = 0; i < kv_dim; ++i) {
    dequantise_row(mla.kv_b, head * kv_dim + i, kv_b.data() + i * shape.lora_rank);
  }
  std::vector<float> expanded(static_cast<size_t>(num_keys * kv_dim));  // [num_keys, nope_dim + v_dim]
  for (int64_t p = index.first_position; p < num_keys; ++p) {
    const float* latent = cache.latents.row<float>(slot_of(index, seq, p));
    for (int64_t i = 0; i < kv_dim; ++i) {
      expanded[static_cast<size_t>(p * kv_dim + i)] =
          dot_product(kv_b.data() + i * shape.lora_rank, latent, shape.lora_rank);
    }
  }

  std::vector<float> scores(static_cast<size_t>(num_keys));    // [num_keys]
  std::vector<double> sums(static_cast<size_t>(shape.v_dim));  // [v_dim]
  for (int64_t t = first_row; t < end_row; ++t) {
    const float* query = q.row<float>(t) + head * shape.qk_dim();
    const int64_t end = index.cache_positions[t] + 1;
    float max = -std::numeric_limits<float>::infinity();
    for (int64_t p = index.first_position; p < end; ++p) {
      const float* key_rope = cache.latents.row<float>(slot_of(index, seq, p)) + shape.lora_rank;
      const float* key_nope = expanded.data() + p * kv_dim;
      const float score = (dot_product(query, key_nope, shape.nope_dim) +
                           dot_product(query + shape.nope_dim, key_rope, shape.rope_dim)) *
                          shape.softmax_scale;
      scores[static_cast<size_t>(p)] = score;
      if (score > max) max = score;
    }
    double total = 0;
    for (double& sum : sums) sum = 0;
    for (int64_t p = index.first_position; p < end; ++p) {
      const double weight = std::exp(scores[static_cast<size_t>(p)] - max);
      const float* value = expanded.data() + p * kv_dim + shape.nope_dim;
      total += weight;
      for (int64_t i = 0; i < shape.v_dim; ++i) sums[static_cast<size_t>(i)] += weight * value[i];
    }
    float* to = out.row<float>(t) + head * shape.v_dim;
    for (int64_t i = 0; i < shape.v_dim; ++i) {
      to[i] = static_cast<float>(sums[static_cast<size_t>(i)] / total);
    }
  }
}

}  // namespace rodin
