// Linear layers and experts of few tokens with FP8 weights (linear_split.cu): with --deterministic those of any
// number, since a token's bits do not depend on it.
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"

namespace rodin::cuda {
namespace {

// Tokens of a tile. `each`: of an expert on average. More than fit cost a second pass over the expert's weights,
// then in the cache; larger tiles leave less room for weights on their way.
int32_t tile_tokens(int64_t num_tokens, int64_t each) {
  if (num_tokens <= 4) return 4;
  if (num_tokens <= 8 || each <= 3) return 8;
  return num_tokens <= 16 || each <= 6 ? 16 : 32;
}

}  // namespace

bool CudaOps::is_splitting(int64_t num_tokens) const {
  return num_tokens > 0 && (is_deterministic_ || num_tokens < kMinQuantizedTokens);
}

SplitParams CudaOps::split_params(const Tensor& x, const Tensor& out, const WeightView& weight) const {
  SplitParams params;
  params.maps[0] = weight_map(weight);
  params.weight[0] = weight;
  params.io[0] = io_of(x, out);
  params.is_x_aligned = has_aligned_rows(x);
  params.num_tokens = static_cast<int32_t>(x.rows);
  params.tile_tokens = tile_tokens(x.rows, x.rows);
  params.most_tokens = std::min(params.tile_tokens, params.num_tokens);
  params.max_rows[0] = weight.rows;
  params.cols[0] = weight.cols;
  params.num_multiprocessors = num_multiprocessors_;
  return params;
}

void CudaOps::run_split_mlp(const Tensor& x, const MlpWeights& mlp, const Tensor& out) {
  SplitParams params = split_params(x, out, view_of(mlp.gate));
  params.is_gated = true;
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
  const bool has_shared = moe.has_shared() && placed.has_shared_maps;
  const MoePlanParams plan = {.expert_ids = expert_ids.row<int32_t>(0),
                              .ids_stride = expert_ids.stride,
                              .num_tokens = static_cast<int32_t>(x.rows),
                              .experts_per_token = k,
                              .num_experts = num_experts,
                              .has_shared = has_shared,
                              .tile_tokens = tile_tokens(x.rows, (x.rows * k + num_experts - 1) / num_experts),
                              .plan = moe_plan_};
  if (x.rows != 1 || planned_ids_ != plan.expert_ids) run_moe_plan(plan, stream_);
  planned_ids_ = nullptr;

  const auto group = [&](SplitParams& params) {
    params.plan = moe_plan_;
    params.max_tiles = moe_max_tiles(plan);
    params.num_shared_tiles =
        has_shared ? static_cast<int32_t>((x.rows + plan.tile_tokens - 1) / plan.tile_tokens) : 0;
    params.num_tokens = plan.num_tokens;
    params.num_experts = num_experts;
    params.tile_tokens = plan.tile_tokens;
    params.most_tokens = std::min(plan.tile_tokens, plan.num_tokens);
  };
  SplitParams mid = split_params(x, expert_mid_, view_of(moe.experts[0].gate));
  group(mid);
  mid.is_gated = true;
  mid.map_table[0] = placed.split_gate_maps;
  mid.map_table[1] = placed.split_up_maps;
  mid.table[0] = placed.gate;
  mid.table[1] = placed.up;
  mid.x_divisor = k;
  mid.is_successor_held = true;
  if (has_shared) {
    mid.io[1] = io_of(x, shared_mid_);
    mid.max_rows[1] = view_of(moe.shared.gate).rows;
    mid.cols[1] = view_of(moe.shared.gate).cols;
  }
  run_linear_split(mid, stream_);

  SplitParams down = split_params(expert_mid_, expert_out_, view_of(moe.experts[0].down));
  group(down);
  down.map_table[0] = placed.down_maps;
  down.table[0] = placed.down;
  down.is_plan_ready = true;
  if (has_shared) {
    down.io[1] = io_of(shared_mid_, shared_out_);
    down.max_rows[1] = view_of(moe.shared.down).rows;
    down.cols[1] = view_of(moe.shared.down).cols;
  }
  run_linear_split(down, stream_);
  if (moe.has_shared() && !has_shared) run_shared(x, moe);
}

}  // namespace rodin::cuda
