// Linear layers and experts of many tokens, whose inputs are quantised (quantize.cu, linear_wgmma.cu). Which
// tokens come this way depends on how many a step has, so --deterministic turns it off.
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"
#include "cuda/tensor_map.h"

namespace rodin::cuda {
namespace {

int64_t padded_channels(int64_t cols) { return (cols + kBlockK - 1) / kBlockK * kBlockK; }

TensorMap token_map(const QuantizedView& x, int64_t num_rows) {
  return make_tensor_map({.data = x.data,
                          .rows = num_rows,
                          .cols = x.stride,
                          .row_bytes = x.stride,
                          .box_rows = kWgmmaTokens,
                          .box_cols = kBlockK},
                         Dtype::kF8E4M3, Swizzle::k128Bytes);
}

TensorMap scale_map(const QuantizedView& x) {
  return make_tensor_map({.data = x.scale,
                          .rows = x.stride / kBlockK,
                          .cols = x.scale_stride,
                          .row_bytes = x.scale_stride * 4,
                          .box_rows = 1,
                          .box_cols = kWgmmaScales},
                         Dtype::kF32, Swizzle::kNone);
}

}  // namespace

TensorMap weight_map(const WeightView& weight, int32_t box_rows) {
  return make_tensor_map({.data = weight.data,
                          .rows = weight.rows,
                          .cols = weight.row_bytes,
                          .row_bytes = weight.row_bytes,
                          .box_rows = box_rows,
                          .box_cols = kBlockK},
                         Dtype::kF8E4M3, Swizzle::k128Bytes);
}

bool has_boxes(const WeightView& weight) {
  return weight.dtype == Dtype::kF8E4M3 && weight.block_rows % 64 == 0;
}

bool has_boxes(const MlpWeights& mlp) {
  for (const Weight* weight : {&mlp.gate, &mlp.up, &mlp.down}) {
    if (!has_boxes(view_of(*weight)) || weight->bias) return false;
  }
  return true;
}

bool CudaOps::is_quantizing(const WeightView& weight, int64_t num_tokens) const {
  return !is_deterministic_ && num_tokens >= kMinQuantizedTokens && has_boxes(weight);
}

bool CudaOps::is_quantizing(const MlpWeights& mlp, int64_t num_tokens) const {
  return is_quantizing(view_of(mlp.gate), num_tokens) && has_boxes(mlp);
}

QuantizedView CudaOps::quantized_view(int64_t max_rows, int64_t cols, int rows_each) {
  QuantizedView view;
  view.stride = padded_channels(cols);
  view.scale_stride = (max_rows + 31) / 32 * 32;
  view.data = workspace<uint8_t>(max_rows * rows_each * view.stride);
  view.scale = workspace<float>(view.stride / kBlockK * view.scale_stride);
  return view;
}

void CudaOps::reserve_quantized() {
  if (is_deterministic_ || limits_.max_step_tokens < kMinQuantizedTokens) return;
  quantized_ = quantized_view(limits_.max_step_tokens, limits_.max_linear_inputs);
  if (limits_.num_experts == 0) return;
  const int64_t slots = moe_tokens_ * limits_.experts_per_token;
  expert_quantized_ = quantized_view(slots, limits_.hidden_size);
  expert_mid_quantized_ = quantized_view(slots, limits_.moe_intermediate_size);
  shared_mid_quantized_ = quantized_view(moe_tokens_, limits_.shared_intermediate_size);
}

QuantizedView CudaOps::fitted(QuantizedView view, int64_t num_rows, int64_t cols) const {
  const int64_t stride = padded_channels(cols);
  check(stride <= view.stride && num_rows <= view.scale_stride, num_rows, " rows of ", cols,
        " channels are more than the room for quantised inputs, ", view.scale_stride, " of ", view.stride);
  view.stride = stride;
  return view;
}

QuantizeParams CudaOps::quantize_params(const Tensor& x, const QuantizedView& out) const {
  return {.x = x.data,
          .x_stride = x.stride,
          .num_rows = static_cast<int32_t>(x.rows),
          .cols = static_cast<int32_t>(x.cols),
          .is_aligned = has_aligned_rows(x),
          .out = fitted(out, x.rows, x.cols)};
}

QuantizeParams CudaOps::slot_inputs(const Tensor& x, const QuantizedView& plain, const QuantizedView& routed,
                                    int32_t experts_per_token, bool has_shared) const {
  QuantizeParams params = quantize_params(x, plain);
  const int64_t slots = x.rows * experts_per_token;
  params.plain_out = params.out;
  params.num_plain_rows = has_shared ? params.num_rows : 0;
  params.out = fitted(routed, slots, x.cols);
  params.rows = moe_plan_.order;
  params.rows_divisor = experts_per_token;
  params.num_rows = static_cast<int32_t>(slots);
  return params;
}

QuantizedView CudaOps::quantize(const Tensor& x) {
  const QuantizeParams params = quantize_params(x, quantized_);
  run_quantize(params, stream_);
  return params.out;
}

WgmmaParams CudaOps::wgmma_params(const QuantizedView& x, int64_t num_rows, const WeightView& weight) const {
  WgmmaParams params;
  params.x[0] = token_map(x, num_rows);
  params.x_scale[0] = scale_map(x);
  params.weight[0] = weight;
  params.maps[0] = weight_map(weight);
  params.num_rows = static_cast<int32_t>(num_rows);
  params.max_rows[0] = weight.rows;
  params.cols[0] = weight.cols;
  params.num_multiprocessors = num_multiprocessors_;
  return params;
}

WgmmaParams CudaOps::gated_params(const Tensor& x, const MlpWeights& mlp) {
  WgmmaParams params = wgmma_params(quantize(x), x.rows, view_of(mlp.gate));
  params.is_gated = true;
  params.weight[1] = view_of(mlp.up);
  params.maps[1] = weight_map(params.weight[1]);
  return params;
}

// Into expert_out_ [slots, H] and shared_out_ [T, H].
void CudaOps::run_quantized_moe(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids) {
  const PlacedMoe& placed = *static_cast<const PlacedMoe*>(moe.packed);
  const auto k = static_cast<int32_t>(moe.route.experts_per_token);
  const int64_t slots = x.rows * k;
  const bool has_shared = moe.has_shared() && placed.has_shared_maps;
  const MoePlanParams plan = plan_params(x.rows, moe, expert_ids, has_shared, kWgmmaTokens);
  run_moe_plan(plan, stream_);
  const auto group = [&](WgmmaParams& params, const TensorMap* maps, const WeightView* table) {
    params.plan = moe_plan_;
    params.max_tiles = moe_max_tiles(plan);
    params.num_shared_tiles =
        has_shared ? static_cast<int32_t>((x.rows + kWgmmaTokens - 1) / kWgmmaTokens) : 0;
    params.map_table[0] = maps;
    params.table[0] = table;
  };
  const auto add_shared = [&](WgmmaParams& params, const QuantizedView& inputs, const Weight& weight) {
    params.x[1] = token_map(inputs, x.rows);
    params.x_scale[1] = scale_map(inputs);
    params.max_rows[1] = view_of(weight).rows;
    params.cols[1] = view_of(weight).cols;
  };

  const QuantizeParams inputs = slot_inputs(x, quantized_, expert_quantized_, k, has_shared);
  run_quantize(inputs, stream_);

  WgmmaParams mid = wgmma_params(inputs.out, slots, view_of(moe.experts[0].gate));
  group(mid, placed.gate_maps, placed.gate);
  mid.is_gated = true;
  mid.map_table[1] = placed.up_maps;
  mid.table[1] = placed.up;
  mid.out_quantized[0] = expert_mid_quantized_;
  mid.out_quantized[1] = shared_mid_quantized_;
  if (has_shared) add_shared(mid, inputs.plain_out, moe.shared.gate);
  run_linear_wgmma(mid, stream_);

  WgmmaParams down = wgmma_params(expert_mid_quantized_, slots, view_of(moe.experts[0].down));
  group(down, placed.down_maps, placed.down);
  if (has_shared) add_shared(down, shared_mid_quantized_, moe.shared.down);
  down.outs[0].out = expert_out_.data;
  down.outs[0].out_stride = expert_out_.stride;
  down.outs[1].out = shared_out_.data;
  down.outs[1].out_stride = shared_out_.stride;
  run_linear_wgmma(down, stream_);
  if (moe.has_shared() && !has_shared) run_shared(x, moe);
}

}  // namespace rodin::cuda
