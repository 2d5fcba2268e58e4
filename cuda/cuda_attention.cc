// Latent attention: rotation and cache write, then for each chunk of the plan
//   q_latent = q_nope W_UK (a linear layer of each head), attention over the splits, combine, out = o W_UV.
#include <algorithm>
#include <numeric>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"
#include "cuda/decode_mla.h"
#include "cuda/mla_wgmma.h"
#include "cuda/tensor_map.h"

namespace rodin::cuda {
namespace {

constexpr int64_t kPartialBudget = int64_t{256} << 20;  // bytes of the splits' results
constexpr int64_t kLatentBudget = int64_t{128} << 20;   // bytes of one latent per token and head

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
  const bool is_cache_fp8 = cache_dtype_ == Dtype::kF8E4M3;
  has_mla_wgmma_ =
      has_mla_wgmma(shape.nope_dim, shape.rope_dim, shape.lora_rank, limits_.block_size, is_cache_fp8);
  check(!is_cache_fp8 || has_mla_wgmma_,
        "an FP8 cache takes kv_lora_rank 512 and multiples of 8 for qk_nope_head_dim and qk_rope_head_dim, "
        "not ",
        shape.lora_rank, ", ", shape.nope_dim, " and ", shape.rope_dim, "; use --kv-cache-dtype bf16");
  const bool has_spread = has_mla_wgmma_ && !is_deterministic_;
  const int64_t most_splits = MlaPlan::most_splits(max_context, has_spread);  // of one token
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
  arrivals_ = workspace<uint64_t>(2 + 2 * kExchangeWords);
  RODIN_CUDA(cudaMemsetAsync(arrivals_, 0, (2 + 2 * kExchangeWords) * sizeof(uint64_t), stream_));
  plan_limits_ = {.num_heads = shape.num_heads,
                  .max_tokens = attention_tokens_,
                  .max_partial_rows = partial_rows_,
                  .max_tile_rows = !has_mla_wgmma_ ? 16
                                   : is_cache_fp8  ? kMlaMostTileRowsFp8
                                                   : kMlaMostTileRows,
                  .has_spread = has_spread,
                  .num_multiprocessors = num_multiprocessors_};
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

MlaEnterParams CudaOps::enter_params(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                                     const Tensor& rope_table, const StepIndex& index,
                                     const CacheLayer& cache) const {
  return {.rope = rope_store_params(q, kv, mla, eps, rope_table, index, cache),
          .w_uk = static_cast<const PlacedMla*>(mla.packed)->w_uk,
          .q_latent = q_latent_,
          .q_latent_stride = latent_stride_,
          .is_q_aligned = has_aligned_rows(q) && mla.shape.qk_dim() % 8 == 0};
}

void CudaOps::mla_store_and_attend(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                                   const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache,
                                   const Tensor& out) {
  const MlaEnterParams enter = enter_params(q, kv, mla, eps, rope_table, index, cache);
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

MlaParams CudaOps::mla_params(const Tensor& q, const MlaShape& shape, const StepIndex& index,
                              const CacheLayer& cache, const Step& step, const MlaChunk& chunk) const {
  return {.q_latent = q_latent_,
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
          .num_heads = static_cast<int32_t>(shape.num_heads),
          .nope_dim = static_cast<int32_t>(shape.nope_dim),
          .rope_dim = static_cast<int32_t>(shape.rope_dim),
          .lora_rank = static_cast<int32_t>(shape.lora_rank),
          .tile_rows = step.plan.tile_rows,
          .spread = step.plan.spread,
          .softmax_scale = shape.softmax_scale,
          .partial = partial_,
          .partial_ml = partial_ml_,
          .out = out_latent_,
          .out_stride = latent_stride_};
}

MlaLeaveParams CudaOps::leave_params(const MlaParams& params, const MlaWeights& mla,
                                     const Tensor& out) const {
  const MlaShape& shape = mla.shape;
  return {.mla = params,
          .w_uv = view_of(mla.kv_b),
          .weight_batch = shape.nope_dim + shape.v_dim,
          .weight_offset = shape.nope_dim,
          .v_dim = static_cast<int32_t>(shape.v_dim),
          .out = out.data,
          .out_stride = out.stride};
}

void CudaOps::run_chunk(const MlaParams& mla, const Tensor& q, const Tensor& q_latent,
                        const CacheLayer& cache) {
  if (!has_mla_wgmma_) return run_mla_attention(mla, stream_);
  const auto qk_dim = static_cast<int64_t>(mla.nope_dim + mla.rope_dim);
  check(has_aligned_rows(q) && q.stride == mla.num_heads * qk_dim,
        "attention takes queries that begin at a multiple of 16 bytes and lie row after row");
  const auto boxes = [](const void* data, int64_t rows, int64_t cols, int64_t stride, int32_t box_rows) {
    return make_tensor_map({.data = data,
                            .rows = rows,
                            .cols = cols,
                            .row_bytes = stride * 2,
                            .box_rows = box_rows,
                            .box_cols = kMlaBoxColumns},
                           Dtype::kBF16, Swizzle::k128Bytes);
  };
  MlaWgmmaParams params;
  params.mla = mla;
  params.piece_rows = std::gcd(mla.block_size, kMlaKeyBlock);
  params.num_multiprocessors = num_multiprocessors_;
  params.q_latent =
      boxes(mla.q_latent, q_latent.rows * mla.num_heads, mla.lora_rank, mla.q_latent_stride, mla.tile_rows);
  params.q_rope = boxes(static_cast<const uint16_t*>(mla.q) + mla.nope_dim, q.rows * mla.num_heads,
                        mla.rope_dim, qk_dim, mla.tile_rows);
  if (!mla.is_cache_fp8) {
    params.cache = boxes(mla.cache, cache.latents.rows, mla.lora_rank + mla.rope_dim, mla.cache_stride,
                         params.piece_rows);
  }
  run_mla_wgmma(params, stream_);
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

    const MlaParams params = mla_params(q, shape, index, cache, step, chunk);
    run_chunk(params, q, q_latent, cache);
    const Tensor chunk_out = out.slice_rows(chunk.first_token, chunk.num_tokens);
    const MlaLeaveParams leave = leave_params(params, mla, chunk_out);
    if (is_mla_leave(leave)) {
      run_mla_leave(leave, stream_);
      continue;
    }
    // Rows of one split each are out already.
    if (!has_mla_wgmma_ || chunk.max_splits > 1) run_mla_combine(params, stream_);

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
