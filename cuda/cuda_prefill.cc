// Attention of prompts: the latents of their sequences gathered and quantised, kv_b applied to them as a
// linear layer, then attention in its naive form, as many heads at a time as the workspace holds keys and
// values of.
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"
#include "cuda/tensor_map.h"

namespace rodin::cuda {
namespace {

constexpr int64_t kExpandedBudget = int64_t{512} << 20;  // bytes of expanded keys and values

// Rows that begin with a scale block, or of a matrix that has one.
WeightView slice_rows(WeightView weight, int64_t first, int64_t rows) {
  weight.data = static_cast<const char*>(weight.data) + first * weight.row_bytes;
  if (weight.block_rows < weight.rows) weight.scale += first / weight.block_rows * weight.scale_cols;
  weight.rows = static_cast<int32_t>(rows);
  return weight;
}

}  // namespace

bool CudaOps::is_expandable(const WeightView& kv_b, const MlaShape& shape) const {
  return is_quantizing(kv_b, kMinQuantizedTokens) && !kv_b.bias &&
         (kv_b.block_rows >= kv_b.rows || (shape.nope_dim + shape.v_dim) % kv_b.block_rows == 0);
}

void CudaOps::reserve_prefill() {
  const MlaShape& shape = limits_.mla;
  if (is_deterministic_ || shape.num_heads == 0 || !has_prefill_weights_ ||
      limits_.max_step_tokens < kMinPrefillTokens || shape.lora_rank % kBlockK != 0 ||
      !has_mla_prefill(shape.nope_dim, shape.rope_dim, shape.v_dim))
    return;
  // One sequence of full length, or a step of fresh prompts that fill up their last blocks of keys.
  const int64_t max_context =
      limits_.max_context > 0 ? limits_.max_context : limits_.num_blocks * limits_.block_size;
  const int64_t keys =
      (std::max(max_context, 2 * limits_.max_step_tokens) + kPrefillKeys - 1) / kPrefillKeys * kPrefillKeys;
  const int64_t key_bytes = (shape.nope_dim + shape.v_dim) * 2;  // of one head
  const int64_t head_keys = std::min(kExpandedBudget / key_bytes, keys * shape.num_heads);
  if (keys > head_keys) return;
  prefill_keys_ = keys;
  prefill_head_keys_ = head_keys;
  prefill_latents_ = quantized_view(keys, shape.lora_rank);
  prefill_rope_ = workspace<uint16_t>(keys * shape.rope_dim);
  prefill_kv_ = workspace<char>(head_keys * key_bytes);
}

void CudaOps::prefill_attention(const Tensor& q, const MlaWeights& mla, const Step& step,
                                const CacheLayer& cache, const Tensor& out) {
  const MlaShape& shape = mla.shape;
  const auto num_keys = static_cast<int64_t>(step.prefill.slots.size());
  run_mla_gather({.cache = cache.latents.data,
                  .cache_stride = cache.latents.stride,
                  .is_cache_fp8 = cache_dtype_ == Dtype::kF8E4M3,
                  .slots = step.prefill_slots,
                  .num_keys = static_cast<int32_t>(num_keys),
                  .lora_rank = static_cast<int32_t>(shape.lora_rank),
                  .rope_dim = static_cast<int32_t>(shape.rope_dim),
                  .latents = prefill_latents_,
                  .rope = prefill_rope_},
                 stream_);
  const auto boxes = [](const void* data, int64_t rows, int64_t cols, int64_t stride) {
    return make_tensor_map({.data = data,
                            .rows = rows,
                            .cols = cols,
                            .row_bytes = stride * 2,
                            .box_rows = kPrefillKeys,
                            .box_cols = 64},
                           Dtype::kBF16, Swizzle::k128Bytes);
  };
  const int64_t head_rows = shape.nope_dim + shape.v_dim;
  const WeightView& kv_b = view_of(mla.kv_b);
  MlaPrefillParams params;
  params.q = boxes(q.data, q.rows, shape.num_heads * shape.qk_dim(), q.stride);
  params.rope = boxes(prefill_rope_, num_keys, shape.rope_dim, shape.rope_dim);
  params.tiles = step.prefill_tiles;
  params.num_tiles = static_cast<int32_t>(step.prefill.tiles.size());
  params.nope_dim = static_cast<int32_t>(shape.nope_dim);
  params.v_dim = static_cast<int32_t>(shape.v_dim);
  params.softmax_scale = shape.softmax_scale;
  params.out = out.data;
  params.out_stride = out.stride;
  const int64_t heads_each = std::min(prefill_head_keys_ / num_keys, shape.num_heads);
  for (int64_t head = 0; head < shape.num_heads; head += heads_each) {
    const int64_t num_heads = std::min(heads_each, shape.num_heads - head);
    WgmmaParams expand =
        wgmma_params(prefill_latents_, num_keys, slice_rows(kv_b, head * head_rows, num_heads * head_rows));
    expand.outs[0].out = prefill_kv_;
    expand.outs[0].out_stride = num_heads * head_rows;
    run_linear_wgmma(expand, stream_);
    params.kv = boxes(prefill_kv_, num_keys, num_heads * head_rows, num_heads * head_rows);
    params.first_head = static_cast<int32_t>(head);
    params.num_heads = static_cast<int32_t>(num_heads);
    run_mla_prefill(params, stream_);
  }
}

}  // namespace rodin::cuda
