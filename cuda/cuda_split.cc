// Linear layers and experts of few tokens with FP8 weights (linear_split.cu), and with --deterministic those
// of any number: a token's bits do not depend on it.
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"
#include "cuda/tensor_map.h"

namespace rodin::cuda {
namespace {

// Units that a matrix must have to be faster this way: fewer leave too many multiprocessors without one.
constexpr int64_t kMinUnits = 100;

// Tokens of a tile. `each`: of an expert on average. More than fit cost a second pass over the expert's
// weights, then in the cache; larger tiles leave less room for weights on their way.
int32_t tile_tokens(int64_t num_tokens, int64_t each) {
  if (num_tokens <= 4 || each <= 1) return 4;
  if (num_tokens <= 8 || each <= 3) return 8;
  return num_tokens <= 16 || each <= 6 ? 16 : 32;
}

}  // namespace

bool CudaOps::is_splitting(int64_t num_tokens, int64_t end) const {
  return num_tokens > 0 && (is_deterministic_ || num_tokens < end);
}

bool CudaOps::is_splitting(const WeightView& weight, int64_t num_tokens, bool is_gated) const {
  const int64_t units = (weight.rows + kSplitRows - 1) / kSplitRows * (is_gated ? 2 : 1);
  return is_splitting(num_tokens, kMinQuantizedTokens) && has_boxes(weight) && units >= kMinUnits &&
         !(is_gated && weight.bias);
}

void CudaOps::reserve_split() {
  const auto most = [&](int64_t tokens) {
    return is_deterministic_ ? tokens : std::min(tokens, kMinQuantizedMoeTokens - 1);
  };
  split_ = quantized_view(most(limits_.max_step_tokens), limits_.max_linear_inputs, 2);
  if (limits_.num_experts == 0) return;
  const int64_t tokens = most(moe_tokens_), slots = tokens * limits_.experts_per_token;
  expert_split_ = quantized_view(slots, limits_.hidden_size, 2);
  expert_mid_split_ = quantized_view(slots, limits_.moe_intermediate_size, 2);
  shared_mid_split_ = quantized_view(tokens, limits_.shared_intermediate_size, 2);
}

namespace {

TensorMap input_map(const QuantizedView& x, int64_t num_rows, int32_t tile_tokens) {
  return make_tensor_map({.data = x.data,
                          .rows = 2 * num_rows,
                          .cols = x.stride,
                          .row_bytes = x.stride,
                          .box_rows = 2 * tile_tokens,
                          .box_cols = kBlockK},
                         Dtype::kF8E4M3, Swizzle::k128Bytes);
}

TensorMap input_scale_map(const QuantizedView& x, int32_t tile_tokens) {
  return make_tensor_map({.data = x.scale,
                          .rows = x.stride / kBlockK,
                          .cols = x.scale_stride,
                          .row_bytes = x.scale_stride * 4,
                          .box_rows = 1,
                          .box_cols = tile_tokens + kSplitScaleMargin},
                         Dtype::kF32, Swizzle::kNone);
}

}  // namespace

SplitParams CudaOps::split_params(const QuantizedView& x, int64_t num_rows, int32_t tile_tokens,
                                  const WeightView& weight) const {
  SplitParams params;
  params.x[0] = input_map(x, num_rows, tile_tokens);
  params.x_scale[0] = input_scale_map(x, tile_tokens);
  params.maps[0] = weight_map(weight);
  params.weight[0] = weight;
  params.num_tokens = static_cast<int32_t>(num_rows);
  params.tile_tokens = tile_tokens;
  params.max_rows[0] = weight.rows;
  params.cols[0] = weight.cols;
  params.num_multiprocessors = num_multiprocessors_;
  return params;
}

SplitParams CudaOps::split_params(const Tensor& x, const WeightView& weight) {
  QuantizeParams inputs = quantize_params(x, split_);
  inputs.is_split = true;
  run_quantize(inputs, stream_);
  return split_params(inputs.out, x.rows, tile_tokens(x.rows, x.rows), weight);
}

void CudaOps::run_split_mlp(const Tensor& x, const MlpWeights& mlp, const Tensor& out) {
  SplitParams params = split_params(x, view_of(mlp.gate));
  params.is_gated = true;
  params.io[0] = io_of(x, out);
  params.weight[1] = view_of(mlp.up);
  params.maps[0] = weight_map(params.weight[0], kSplitRows / 2);
  params.maps[1] = weight_map(params.weight[1], kSplitRows / 2);
  run_linear_split(params, stream_);
}

// Into expert_out_ [slots, H] and shared_out_ [T, H].
void CudaOps::run_split_moe(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids) {
  const PlacedMoe& placed = *static_cast<const PlacedMoe*>(moe.packed);
  const auto k = static_cast<int32_t>(moe.route.experts_per_token);
  const auto num_experts = static_cast<int32_t>(moe.route.num_experts);
  const int64_t slots = x.rows * k;
  const bool has_shared = moe.has_shared() && placed.has_shared_maps;
  const int32_t tile = tile_tokens(x.rows, (slots + num_experts - 1) / num_experts);
  const MoePlanParams plan = plan_params(x.rows, moe, expert_ids, has_shared, tile);
  make_plan(plan);
  const auto group = [&](SplitParams& params, const QuantizedView& shared_inputs, const Weight& shared) {
    params.plan = moe_plan_;
    params.max_tiles = moe_max_tiles(plan);
    params.num_tokens = plan.num_tokens;
    params.num_experts = num_experts;
    if (!has_shared) return;
    params.num_shared_tiles = static_cast<int32_t>((x.rows + tile - 1) / tile);
    params.x[1] = input_map(shared_inputs, x.rows, tile);
    params.x_scale[1] = input_scale_map(shared_inputs, tile);
    params.max_rows[1] = view_of(shared).rows;
    params.cols[1] = view_of(shared).cols;
  };

  QuantizeParams inputs = slot_inputs(x, split_, expert_split_, k, has_shared);
  inputs.is_split = true;
  inputs.is_successor_held = true;
  run_quantize(inputs, stream_);

  SplitParams mid = split_params(inputs.out, slots, tile, view_of(moe.experts[0].gate));
  group(mid, inputs.plain_out, moe.shared.gate);
  mid.is_gated = true;
  mid.map_table[0] = placed.split_gate_maps;
  mid.map_table[1] = placed.split_up_maps;
  mid.table[0] = placed.gate;
  mid.table[1] = placed.up;
  mid.io[0] = io_of(x, expert_mid_);
  mid.io[1] = io_of(x, shared_mid_);
  run_linear_split(mid, stream_);

  QuantizeParams middle = quantize_params(expert_mid_.slice_rows(0, slots), expert_mid_split_);
  middle.is_split = true;
  middle.plain_x = shared_mid_.data;
  middle.plain_x_stride = shared_mid_.stride;
  middle.plain_cols = static_cast<int32_t>(shared_mid_.cols);
  middle.num_plain_rows = has_shared ? static_cast<int32_t>(x.rows) : 0;
  middle.plain_out = fitted(shared_mid_split_, x.rows, shared_mid_.cols);
  run_quantize(middle, stream_);

  SplitParams down = split_params(middle.out, slots, tile, view_of(moe.experts[0].down));
  group(down, middle.plain_out, moe.shared.down);
  down.map_table[0] = placed.down_maps;
  down.table[0] = placed.down;
  down.io[0] = io_of(expert_mid_, expert_out_);
  down.io[1] = io_of(shared_mid_, shared_out_);
  run_linear_split(down, stream_);
  if (moe.has_shared() && !has_shared) run_shared(x, moe);
}

}  // namespace rodin::cuda
