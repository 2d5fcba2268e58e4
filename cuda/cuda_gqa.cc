// Grouped-query attention.
#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"

namespace rodin::cuda {

GqaParams CudaOps::gqa_params(const Tensor& q, const GqaShape& shape, const StepIndex& index,
                              const CacheLayer& cache) const {
  return {.q = q.data,
          .q_stride = q.stride,
          .cache = cache.latents.data,
          .cache_stride = cache.latents.stride,
          .slots = index.slots,
          .seq_of_token = index.seq_of_token,
          .cache_positions = index.cache_positions,
          .block_table_start = index.block_table_start,
          .block_table = index.block_table,
          .num_tokens = static_cast<int32_t>(index.num_tokens),
          .num_heads = static_cast<int32_t>(shape.num_heads),
          .num_kv_heads = static_cast<int32_t>(shape.num_kv_heads),
          .head_dim = static_cast<int32_t>(shape.head_dim),
          .first_position = static_cast<int32_t>(index.first_position),
          .block_size = static_cast<int32_t>(index.block_size),
          .softmax_scale = shape.softmax_scale};
}

void CudaOps::gqa_rope_store(const Tensor& q, const Tensor& kv, const GqaShape& shape,
                             const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache) {
  GqaParams params = gqa_params(q, shape, index, cache);
  params.kv = kv.data;
  params.kv_stride = kv.stride;
  params.rope_table = rope_table.row<float>(0);
  params.rope_stride = rope_table.stride;
  run_gqa_store(params, stream_);
}

void CudaOps::gqa_attention(const Tensor& q, const GqaShape& shape, const StepIndex& index,
                            const CacheLayer& cache, const Tensor& out) {
  GqaParams params = gqa_params(q, shape, index, cache);
  params.out = out.data;
  params.out_stride = out.stride;
  run_gqa_attention(params, stream_);
}

}  // namespace rodin::cuda
