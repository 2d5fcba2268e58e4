// Linear layers and the mixture of experts.
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"

namespace rodin::cuda {
namespace {

constexpr size_t kMoeBudget = size_t{512} << 20;  // bytes of the experts' intermediate results

}  // namespace

bool has_aligned_rows(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0;
}

LinearIo io_of(const Tensor& x, const Tensor& out) { return {x.data, x.stride, out.data, out.stride}; }

LinearParams CudaOps::linear_params(const Tensor& x, const Tensor& out, const WeightView& weight) const {
  LinearParams params;
  params.weight[0] = weight;
  params.io[0] = io_of(x, out);
  params.weight_dtype = weight.dtype;
  params.out_dtype = out.dtype;
  params.is_x_aligned = has_aligned_rows(x);
  params.num_tokens = static_cast<int32_t>(x.rows);
  params.max_rows = weight.rows;
  params.max_cols = weight.cols;
  return params;
}

void CudaOps::linear(const Tensor& x, const Weight& weight, const Tensor& out) {
  if (out.dtype == Dtype::kBF16 && is_quantizing(view_of(weight), x.rows)) {
    WgmmaParams params = wgmma_params(quantize(x), x.rows, view_of(weight));
    params.outs[0] = io_of(x, out);
    return run_linear_wgmma(params, stream_);
  }
  if (out.dtype == Dtype::kBF16 && is_splitting(view_of(weight), x.rows, false)) {
    SplitParams params = split_params(x, view_of(weight));
    params.io[0] = io_of(x, out);
    return run_linear_split(params, stream_);
  }
  run_linear(linear_params(x, out, view_of(weight)), stream_);
}

void CudaOps::linear_pair(const Tensor& x, const Weight& weight0, const Tensor& out0, const Weight& weight1,
                          const Tensor& out1) {
  const WeightView& view1 = view_of(weight1);
  LinearParams params = linear_params(x, out0, view_of(weight0));
  if (view1.dtype != params.weight_dtype || view1.cols != params.max_cols || out0.dtype != out1.dtype) {
    run_linear(params, stream_);
    linear(x, weight1, out1);
    return;
  }
  if (out0.dtype == Dtype::kBF16 && is_quantizing(params.weight[0], x.rows) && is_quantizing(view1, x.rows)) {
    WgmmaParams both = wgmma_params(quantize(x), x.rows, params.weight[0]);
    both.weight[1] = view1;
    both.maps[1] = weight_map(view1);
    both.x[1] = both.x[0];
    both.x_scale[1] = both.x_scale[0];
    both.max_rows[1] = view1.rows;
    both.cols[1] = view1.cols;
    both.outs[0] = params.io[0];
    both.outs[1] = io_of(x, out1);
    return run_linear_wgmma(both, stream_);
  }
  if (out0.dtype == Dtype::kBF16 && is_splitting(params.weight[0], x.rows, false) &&
      is_splitting(view1, x.rows, false)) {
    SplitParams both = split_params(x, params.weight[0]);
    both.io[0] = params.io[0];
    both.x[1] = both.x[0];
    both.x_scale[1] = both.x_scale[0];
    both.weight[1] = view1;
    both.maps[1] = weight_map(view1);
    both.io[1] = io_of(x, out1);
    both.max_rows[1] = view1.rows;
    both.cols[1] = view1.cols;
    return run_linear_split(both, stream_);
  }
  params.is_pair = true;
  params.weight[1] = view1;
  params.io[1] = io_of(x, out1);
  params.max_rows = std::max(params.max_rows, view1.rows);
  run_linear(params, stream_);
}

void CudaOps::run_mlp_linear(const Tensor& x, const MlpWeights& mlp, const Tensor& out) {
  const WeightView& up = view_of(mlp.up);
  LinearParams params = linear_params(x, out, view_of(mlp.gate));
  check(up.dtype == params.weight_dtype,
        "gate_proj and up_proj of a layer have different dtypes, which the GPU backend ",
        "does not take; use --device cpu");
  params.is_gated = true;
  params.weight[1] = up;
  run_linear(params, stream_);
}

void CudaOps::gate_up_silu(const Tensor& x, const MlpWeights& mlp, const Tensor& out) {
  if (is_quantizing(mlp, x.rows)) {
    WgmmaParams params = gated_params(x, mlp);
    params.outs[0] = io_of(x, out);
    return run_linear_wgmma(params, stream_);
  }
  if (is_splitting(view_of(mlp.gate), x.rows, true) && is_splitting(view_of(mlp.up), x.rows, true))
    return run_split_mlp(x, mlp, out);
  run_mlp_linear(x, mlp, out);
}

void CudaOps::reserve_moe() {
  if (limits_.num_experts == 0) return;
  const int64_t k = limits_.experts_per_token;
  const auto tensor = [&](int64_t rows, int64_t cols) {
    const int64_t stride = (cols + 7) / 8 * 8;
    return Tensor{workspace<uint16_t>(rows * stride), Dtype::kBF16, rows, cols, stride};
  };
  const int64_t token_bytes = 2 * (k * (limits_.moe_intermediate_size + limits_.hidden_size) +
                                   limits_.shared_intermediate_size + limits_.hidden_size);
  moe_tokens_ = std::clamp<int64_t>(static_cast<int64_t>(kMoeBudget) / token_bytes, 1,
                                    std::max<int64_t>(limits_.max_step_tokens, 1));
  router_logits_ = workspace<float>(limits_.max_step_tokens * limits_.num_experts);
  expert_mid_ = tensor(moe_tokens_ * k, limits_.moe_intermediate_size);
  shared_mid_ = tensor(moe_tokens_, limits_.shared_intermediate_size);
  expert_out_ = tensor(moe_tokens_ * k, limits_.hidden_size);
  shared_out_ = tensor(moe_tokens_, limits_.hidden_size);
  moe_plan_.order = workspace<int32_t>(moe_tokens_ * k);
  moe_plan_.tiles = workspace<MoeTile>(moe_tokens_ * k + moe_tokens_);
  moe_plan_.num_tiles = workspace<int32_t>(1);
  gate_done_ = workspace<uint32_t>(kGateFewTokens);
  RODIN_CUDA(cudaMemsetAsync(gate_done_, 0, kGateFewTokens * sizeof(uint32_t), stream_));
  reserve_decode_moe();
}

RouteKernelParams CudaOps::route_params(int64_t num_tokens, const MoeWeights& moe, const Tensor& expert_ids,
                                        const Tensor& expert_weights) {
  // One token's experts need no sorting: the router makes its plan.
  const bool is_planned = num_tokens == 1;
  planned_ids_ = is_planned ? expert_ids.row<int32_t>(0) : nullptr;
  return {.logits = router_logits_,
          .correction_bias = moe.correction_bias,
          .expert_ids = expert_ids.row<int32_t>(0),
          .ids_stride = expert_ids.stride,
          .expert_weights = expert_weights.row<float>(0),
          .weights_stride = expert_weights.stride,
          .num_tokens = static_cast<int32_t>(num_tokens),
          .route = moe.route,
          .plan = is_planned ? moe_plan_ : MoePlan{},
          .has_shared = moe.has_shared() && static_cast<const PlacedMoe*>(moe.packed)->is_shared_grouped};
}

void CudaOps::route(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
                    const Tensor& expert_weights) {
  if (x.rows == 0) return;
  const int64_t num_experts = moe.route.num_experts;
  linear(x, moe.router, {router_logits_, Dtype::kF32, x.rows, num_experts, num_experts});
  run_route(route_params(x.rows, moe, expert_ids, expert_weights), stream_);
}

void CudaOps::add_rms_norm_route(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                                 const Tensor& out, const MoeWeights& moe, const Tensor& expert_ids,
                                 const Tensor& expert_weights) {
  if (out.rows == 0) return;
  const MoeGateParams gate = {.norm = norm_params(residual, &delta, weight, eps, out),
                              .router = view_of(moe.router),
                              .route = route_params(out.rows, moe, expert_ids, expert_weights),
                              .logits = router_logits_,
                              .done = gate_done_};
  if (is_moe_gate(gate)) return run_moe_gate(gate, stream_);
  Ops::add_rms_norm_route(residual, delta, weight, eps, out, moe, expert_ids, expert_weights);
}

void CudaOps::moe(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
                  const Tensor& expert_weights, const Tensor& out) {
  for (int64_t first = 0; first < x.rows; first += moe_tokens_) {
    const int64_t count = std::min(moe_tokens_, x.rows - first);
    run_moe_combine(moe_chunk(x.slice_rows(first, count), moe, expert_ids.slice_rows(first, count),
                              expert_weights.slice_rows(first, count), out.slice_rows(first, count)),
                    stream_);
  }
}

void CudaOps::moe_add_rms_norm(const Tensor& x, const MoeWeights& weights, const Tensor& expert_ids,
                               const Tensor& expert_weights, const Tensor& delta, const Tensor& residual,
                               const float* weight, float eps, const Tensor& out) {
  for (int64_t first = 0; first < x.rows; first += moe_tokens_) {
    const int64_t count = std::min(moe_tokens_, x.rows - first);
    const Tensor chunk_delta = delta.slice_rows(first, count);
    const MoeNormParams params = {
        .combine = moe_chunk(x.slice_rows(first, count), weights, expert_ids.slice_rows(first, count),
                             expert_weights.slice_rows(first, count), chunk_delta),
        .norm = norm_params(residual.slice_rows(first, count), nullptr, weight, eps,
                            out.slice_rows(first, count))};
    if (is_moe_norm(params)) {
      run_moe_norm(params, stream_);
    } else {
      run_moe_combine(params.combine, stream_);
      add_rms_norm(residual.slice_rows(first, count), chunk_delta, weight, eps, out.slice_rows(first, count));
    }
  }
}

MoePlanParams CudaOps::plan_params(int64_t num_tokens, const MoeWeights& moe, const Tensor& expert_ids,
                                   bool has_shared, int32_t tile_tokens) const {
  return {.expert_ids = expert_ids.row<int32_t>(0),
          .ids_stride = expert_ids.stride,
          .num_tokens = static_cast<int32_t>(num_tokens),
          .experts_per_token = static_cast<int32_t>(moe.route.experts_per_token),
          .num_experts = static_cast<int32_t>(moe.route.num_experts),
          .has_shared = has_shared,
          .tile_tokens = tile_tokens,
          .plan = moe_plan_};
}

void CudaOps::make_plan(const MoePlanParams& plan) {
  if (plan.num_tokens != 1 || planned_ids_ != plan.expert_ids) run_moe_plan(plan, stream_);
  planned_ids_ = nullptr;
}

MoeCombineParams CudaOps::moe_chunk(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
                                    const Tensor& expert_weights, const Tensor& out) {
  const PlacedMoe& placed = *static_cast<const PlacedMoe*>(moe.packed);
  const auto k = static_cast<int32_t>(moe.route.experts_per_token);
  const auto num_experts = static_cast<int32_t>(moe.route.num_experts);
  const bool is_shared_grouped = moe.has_shared() && placed.is_shared_grouped;
  const int32_t shared_rows = is_shared_grouped ? view_of(moe.shared.gate).rows : 0;
  if (placed.split_gate_maps != nullptr && is_splitting(x.rows, kMinQuantizedMoeTokens)) {
    run_split_moe(x, moe, expert_ids);
    return combine_params(x, moe, expert_weights, out);
  }
  if (placed.gate_maps != nullptr && !is_deterministic_ && x.rows >= kMinQuantizedTokens) {
    planned_ids_ = nullptr;
    run_quantized_moe(x, moe, expert_ids);
    return combine_params(x, moe, expert_weights, out);
  }
  const auto tokens_each =
      static_cast<int32_t>(std::max<int64_t>((x.rows * k + num_experts - 1) / num_experts, 1));

  const MoePlanParams plan =
      plan_params(x.rows, moe, expert_ids, is_shared_grouped, linear_tile_tokens(tokens_each));
  make_plan(plan);

  LinearParams params = linear_params(x, expert_mid_, view_of(moe.experts[0].gate));
  params.is_gated = true;
  params.table[0] = placed.gate;
  params.table[1] = placed.up;
  params.plan = moe_plan_;
  params.max_tiles = moe_max_tiles(plan);
  params.num_experts = num_experts;
  params.x_divisor = k;
  params.has_shared = is_shared_grouped;
  params.tile_tokens = std::min(plan.tile_tokens, plan.num_tokens);
  params.num_tokens = tokens_each;
  params.io[1] = io_of(x, shared_mid_);
  params.max_rows = std::max(params.max_rows, shared_rows);
  run_linear(params, stream_);

  LinearParams down = linear_params(expert_mid_, expert_out_, view_of(moe.experts[0].down));
  down.table[0] = placed.down;
  down.plan = moe_plan_;
  down.max_tiles = params.max_tiles;
  down.num_experts = num_experts;
  down.has_shared = is_shared_grouped;
  down.tile_tokens = params.tile_tokens;
  down.num_tokens = tokens_each;
  down.io[1] = io_of(shared_mid_, shared_out_);
  down.max_cols = std::max(down.max_cols, shared_rows);
  run_linear(down, stream_);

  if (moe.has_shared() && !is_shared_grouped) run_shared(x, moe);
  return combine_params(x, moe, expert_weights, out);
}

// A shared expert that does not run with the routed ones.
void CudaOps::run_shared(const Tensor& x, const MoeWeights& moe) {
  const Tensor mid = shared_mid_.slice_rows(0, x.rows);
  run_mlp_linear(x, moe.shared, mid);
  linear(mid, moe.shared.down, shared_out_.slice_rows(0, x.rows));
}

MoeCombineParams CudaOps::combine_params(const Tensor& x, const MoeWeights& moe, const Tensor& expert_weights,
                                         const Tensor& out) const {
  return {.routed = expert_out_.data,
          .shared = moe.has_shared() ? shared_out_.data : nullptr,
          .stride = expert_out_.stride,
          .expert_weights = expert_weights.row<float>(0),
          .weights_stride = expert_weights.stride,
          .out = out.data,
          .out_stride = out.stride,
          .num_tokens = static_cast<int32_t>(x.rows),
          .cols = static_cast<int32_t>(out.cols),
          .experts_per_token = static_cast<int32_t>(moe.route.experts_per_token)};
}

}  // namespace rodin::cuda
