// Linear layers and experts of many tokens, whose inputs are quantised (quantize.cu, linear_wgmma.cu). Which
// tokens come this way depends on how many a step has, so --deterministic turns it off.
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"
#include "cuda/tensor_map.h"

namespace rodin::cuda {
namespace {

int64_t padded_channels(int64_t cols) { return (cols + kBlockK - 1) / kBlockK * kBlockK; }

}  // namespace

TensorMap weight_map(const WeightView& weight) {
  return make_tensor_map({.data = weight.data,
                          .rows = weight.rows,
                          .cols = weight.row_bytes,
                          .row_bytes = weight.row_bytes,
                          .box_rows = 64,
                          .box_cols = kBlockK},
                         Dtype::kF8E4M3, Swizzle::k128Bytes);
}

bool CudaOps::is_quantizing(const WeightView& weight, int64_t num_tokens) const {
  return !is_deterministic_ && num_tokens >= kMinQuantizedTokens && weight.dtype == Dtype::kF8E4M3 &&
         weight.block_rows % 64 == 0;
}

bool CudaOps::is_quantizing(const MlpWeights& mlp, int64_t num_tokens) const {
  for (const Weight* weight : {&mlp.gate, &mlp.up, &mlp.down}) {
    if (!is_quantizing(view_of(*weight), num_tokens)) return false;
  }
  return !mlp.gate.bias && !mlp.up.bias;
}

QuantizedView CudaOps::quantized_view(int64_t max_rows, int64_t cols) {
  QuantizedView view;
  view.stride = padded_channels(cols);
  view.scale_stride = (max_rows + 31) / 32 * 32;
  view.data = workspace<uint8_t>(max_rows * view.stride);
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

QuantizedView CudaOps::quantize(const Tensor& x, QuantizedView out, const int32_t* rows, int64_t num_rows,
                                int32_t divisor) {
  const int64_t stride = padded_channels(x.cols);
  check(stride <= out.stride && num_rows <= out.scale_stride, num_rows, " rows of ", x.cols,
        " channels are more than the room for quantised inputs, ", out.scale_stride, " of ", out.stride);
  out.stride = stride;
  run_quantize({.x = x.data,
                .x_stride = x.stride,
                .rows = rows,
                .rows_divisor = divisor,
                .num_rows = static_cast<int32_t>(num_rows),
                .cols = static_cast<int32_t>(x.cols),
                .is_aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0,
                .out = out},
               stream_);
  return out;
}

WgmmaParams CudaOps::wgmma_params(const QuantizedView& x, int64_t num_rows, const WeightView& weight) const {
  WgmmaParams params;
  params.x = make_tensor_map({.data = x.data,
                              .rows = num_rows,
                              .cols = x.stride,
                              .row_bytes = x.stride,
                              .box_rows = kWgmmaTokens,
                              .box_cols = kBlockK},
                             Dtype::kF8E4M3, Swizzle::k128Bytes);
  params.x_scale = make_tensor_map({.data = x.scale,
                                    .rows = x.stride / kBlockK,
                                    .cols = x.scale_stride,
                                    .row_bytes = x.scale_stride * 4,
                                    .box_rows = 1,
                                    .box_cols = kWgmmaTokens},
                                   Dtype::kF32, Swizzle::kNone);
  params.weight[0] = weight;
  params.maps[0] = weight_map(weight);
  params.num_rows = static_cast<int32_t>(num_rows);
  params.max_rows = weight.rows;
  params.cols = weight.cols;
  params.num_multiprocessors = num_multiprocessors_;
  return params;
}

WgmmaParams CudaOps::gated_params(const Tensor& x, const MlpWeights& mlp) {
  WgmmaParams params = wgmma_params(quantize(x, quantized_, nullptr, x.rows, 1), x.rows, view_of(mlp.gate));
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
  const MoePlanParams plan = {.expert_ids = expert_ids.row<int32_t>(0),
                              .ids_stride = expert_ids.stride,
                              .num_tokens = static_cast<int32_t>(x.rows),
                              .experts_per_token = k,
                              .num_experts = static_cast<int32_t>(moe.route.num_experts),
                              .has_shared = false,
                              .tile_tokens = kWgmmaTokens,
                              .plan = moe_plan_};
  run_moe_plan(plan, stream_);

  WgmmaParams mid = wgmma_params(quantize(x, expert_quantized_, moe_plan_.order, slots, k), slots,
                                 view_of(moe.experts[0].gate));
  mid.is_gated = true;
  mid.plan = moe_plan_;
  mid.max_tiles = moe_max_tiles(plan);
  mid.map_table[0] = placed.gate_maps;
  mid.map_table[1] = placed.up_maps;
  mid.table[0] = placed.gate;
  mid.table[1] = placed.up;
  mid.out_quantized = expert_mid_quantized_;
  mid.out_quantized.stride = padded_channels(mid.max_rows);
  run_linear_wgmma(mid, stream_);

  WgmmaParams down = wgmma_params(mid.out_quantized, slots, view_of(moe.experts[0].down));
  down.plan = moe_plan_;
  down.max_tiles = mid.max_tiles;
  down.map_table[0] = placed.down_maps;
  down.table[0] = placed.down;
  down.outs[0].out = expert_out_.data;
  down.outs[0].out_stride = expert_out_.stride;
  down.out_rows = moe_plan_.order;
  run_linear_wgmma(down, stream_);

  if (!moe.has_shared()) return;
  if (is_quantizing(moe.shared, x.rows)) {
    run_quantized_mlp(x, moe.shared, shared_out_.slice_rows(0, x.rows));
  } else {
    run_shared(x, moe);
  }
}

// The shared expert, its intermediate results quantised.
void CudaOps::run_quantized_mlp(const Tensor& x, const MlpWeights& mlp, const Tensor& out) {
  WgmmaParams mid = gated_params(x, mlp);
  mid.out_quantized = shared_mid_quantized_;
  mid.out_quantized.stride = padded_channels(mid.max_rows);
  run_linear_wgmma(mid, stream_);
  WgmmaParams down = wgmma_params(mid.out_quantized, x.rows, view_of(mlp.down));
  down.outs[0].out = out.data;
  down.outs[0].out_stride = out.stride;
  run_linear_wgmma(down, stream_);
}

}  // namespace rodin::cuda
