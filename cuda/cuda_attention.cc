// Latent attention: rotation and cache write, then for each chunk of the plan
//   q_latent = q_nope W_UK (a linear layer of each head), attention over the splits, combine, out = o W_UV.
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"

namespace rodin::cuda {
namespace {

constexpr int64_t kPartialBudget = int64_t{256} << 20;  // bytes of the splits' results
constexpr int64_t kLatentBudget = int64_t{128} << 20;   // bytes of one latent per token and head

bool is_aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0;
}

}  // namespace

void CudaOps::reserve_attention() {
  const MlaShape& shape = limits_.mla;
  if (limits_.gqa.num_heads > 0) {  // needs no workspace
    check(limits_.gqa.head_dim <= kGqaMaxHeadDim, "attention heads of ", limits_.gqa.head_dim,
          " are longer than the ", kGqaMaxHeadDim, " that the GPU takes; use --device cpu");
    check(cache_dtype_ == Dtype::kBF16,
          "an FP8 cache takes multi-head latent attention alone; use --kv-cache-dtype bf16");
    return;
  }
  const int64_t max_context = std::max<int64_t>(
      limits_.max_context > 0 ? limits_.max_context : limits_.num_blocks * limits_.block_size, 1);
  // Of one token. Up to 8192 positions there are at most 8 splits, behind them more at every 1024.
  const int64_t most_splits = mla_padded_splits(mla_num_splits(static_cast<int32_t>(max_context - 1)));
  check(cache_dtype_ != Dtype::kF8E4M3 || (shape.lora_rank == 512 && shape.rope_dim % 8 == 0),
        "an FP8 cache takes kv_lora_rank 512 and a multiple of 8 for qk_rope_head_dim, not ", shape.lora_rank,
        " and ", shape.rope_dim, "; use --kv-cache-dtype bf16");
  latent_stride_ = (shape.lora_rank + 7) / 8 * 8;
  const int64_t row_bytes = shape.lora_rank * 4 + 8;
  const int64_t token_rows = shape.num_heads * most_splits;
  partial_rows_ =
      std::max(std::min(kPartialBudget / row_bytes, limits_.max_step_tokens * token_rows), token_rows);
  attention_tokens_ =
      std::clamp<int64_t>(kLatentBudget / (shape.num_heads * latent_stride_ * 2), 1, limits_.max_step_tokens);
  q_latent_ = workspace<uint16_t>(attention_tokens_ * shape.num_heads * latent_stride_);
  out_latent_ = workspace<uint16_t>(attention_tokens_ * shape.num_heads * latent_stride_);
  partial_ = workspace<float>(partial_rows_ * shape.lora_rank);
  partial_ml_ = workspace<float>(partial_rows_ * 2);
}

RopeStoreParams CudaOps::rope_store_params(const Tensor& q, const Tensor& kv, const MlaWeights& mla,
                                           float eps, const Tensor& rope_table, const StepIndex& index,
                                           const CacheLayer& cache) const {
  const MlaShape& shape = mla.shape;
  return {.q = q.data,
          .q_stride = q.stride,
          .kv = kv.data,
          .kv_stride = kv.stride,
          .norm_weight = mla.kv_a_norm,
          .eps = eps,
          .rope_table = rope_table.row<float>(0),
          .rope_stride = rope_table.stride,
          .slots = index.slots,
          .cache = cache.latents.data,
          .cache_stride = cache.latents.stride,
          .num_tokens = static_cast<int32_t>(index.num_tokens),
          .num_heads = static_cast<int32_t>(shape.num_heads),
          .nope_dim = static_cast<int32_t>(shape.nope_dim),
          .rope_dim = static_cast<int32_t>(shape.rope_dim),
          .lora_rank = static_cast<int32_t>(shape.lora_rank),
          .is_interleaved = shape.rope_interleave,
          .is_cache_fp8 = cache_dtype_ == Dtype::kF8E4M3};
}

void CudaOps::mla_rope_store(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                             const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache) {
  run_rope_store(rope_store_params(q, kv, mla, eps, rope_table, index, cache), stream_);
}

void CudaOps::mla_store_and_attend(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                                   const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache,
                                   const Tensor& out) {
  const MlaEnterParams enter = {.rope = rope_store_params(q, kv, mla, eps, rope_table, index, cache),
                                .w_uk = static_cast<const PlacedMla*>(mla.packed)->w_uk,
                                .q_latent = q_latent_,
                                .q_latent_stride = latent_stride_,
                                .is_q_aligned = is_aligned(q) && mla.shape.qk_dim() % 8 == 0};
  // One launch where the step is a single chunk.
  const std::vector<MlaChunk>& chunks = step_of(index).plan.chunks;
  const bool is_entered =
      is_mla_enter(enter) && chunks.size() == 1 && chunks[0].num_tokens == index.num_tokens;
  if (is_entered) {
    run_mla_enter(enter, stream_);
  } else {
    run_rope_store(enter.rope, stream_);
  }
  attend(q, mla, index, cache, out, is_entered);
}

void CudaOps::mla_attention(const Tensor& q, const MlaWeights& mla, const StepIndex& index,
                            const CacheLayer& cache, const Tensor& out) {
  attend(q, mla, index, cache, out, false);
}

void CudaOps::attend(const Tensor& q, const MlaWeights& mla, const StepIndex& index, const CacheLayer& cache,
                     const Tensor& out, bool has_q_latent) {
  const MlaShape& shape = mla.shape;
  const Step& step = step_of(index);
  const PlacedMla& placed = *static_cast<const PlacedMla*>(mla.packed);
  const auto num_heads = static_cast<int32_t>(shape.num_heads);
  if (!step.prefill.tiles.empty()) prefill_attention(q, mla, step, cache, out);
  const int64_t latent_row = shape.num_heads * latent_stride_;
  for (const MlaChunk& chunk : step.plan.chunks) {
    const Tensor chunk_q = q.slice_rows(chunk.first_token, chunk.num_tokens);
    const Tensor q_latent = {q_latent_, Dtype::kBF16, chunk.num_tokens, latent_row, latent_row};
    const Tensor out_latent = {out_latent_, Dtype::kBF16, chunk.num_tokens, latent_row, latent_row};

    LinearParams absorb = linear_params(chunk_q, q_latent, placed.w_uk);
    absorb.num_batches = num_heads;
    absorb.batch_rows = static_cast<int32_t>(shape.lora_rank);
    absorb.max_rows = absorb.batch_rows;
    absorb.weight_batch = shape.lora_rank;
    absorb.x_batch = shape.qk_dim();
    absorb.out_batch = latent_stride_;
    absorb.is_x_aligned = absorb.is_x_aligned && shape.qk_dim() % 8 == 0;
    if (!has_q_latent) run_linear(absorb, stream_);

    const MlaParams params = {.q_latent = q_latent_,
                              .q_latent_stride = latent_stride_,
                              .q = q.data,
                              .q_stride = q.stride,
                              .cache = cache.latents.data,
                              .cache_stride = cache.latents.stride,
                              .is_cache_fp8 = cache_dtype_ == Dtype::kF8E4M3,
                              .q_start = index.q_start,
                              .cache_positions = index.cache_positions,
                              .block_table_start = index.block_table_start,
                              .block_table = index.block_table,
                              .tiles = step.tiles + chunk.first_tile,
                              .num_tiles = chunk.num_tiles,
                              .max_splits = chunk.max_splits,
                              .first_token = chunk.first_token,
                              .num_tokens = chunk.num_tokens,
                              .first_position = static_cast<int32_t>(index.first_position),
                              .block_size = static_cast<int32_t>(index.block_size),
                              .num_heads = num_heads,
                              .nope_dim = static_cast<int32_t>(shape.nope_dim),
                              .rope_dim = static_cast<int32_t>(shape.rope_dim),
                              .lora_rank = static_cast<int32_t>(shape.lora_rank),
                              .row_tiles = step.plan.row_tiles,
                              .softmax_scale = shape.softmax_scale,
                              .partial = partial_,
                              .partial_ml = partial_ml_,
                              .out = out_latent_,
                              .out_stride = latent_stride_};
    run_mla_attention(params, stream_);
    const Tensor chunk_out = out.slice_rows(chunk.first_token, chunk.num_tokens);
    const MlaLeaveParams leave = {.mla = params,
                                  .w_uv = view_of(mla.kv_b),
                                  .weight_batch = shape.nope_dim + shape.v_dim,
                                  .weight_offset = shape.nope_dim,
                                  .v_dim = static_cast<int32_t>(shape.v_dim),
                                  .out = chunk_out.data,
                                  .out_stride = chunk_out.stride};
    if (is_mla_leave(leave)) {
      run_mla_leave(leave, stream_);
      continue;
    }
    run_mla_combine(params, stream_);

    LinearParams values = linear_params(out_latent, chunk_out, view_of(mla.kv_b));
    values.num_batches = num_heads;
    values.batch_rows = static_cast<int32_t>(shape.v_dim);
    values.max_rows = values.batch_rows;
    values.weight_batch = shape.nope_dim + shape.v_dim;
    values.weight_offset = shape.nope_dim;
    values.x_batch = latent_stride_;
    values.out_batch = shape.v_dim;
    run_linear(values, stream_);
  }
}

}  // namespace rodin::cuda
