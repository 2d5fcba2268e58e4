// A MoE layer of one token in two launches (decode_experts.cu, decode_down.cu), and the norm behind it where
// its reader does not make it.
#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"
#include "cuda/decode_moe.h"

namespace rodin::cuda {

void CudaOps::reserve_decode_moe() {
  num_decode_clusters_ = prepare_decode_experts();
  prepare_decode_down();
  units_taken_ = workspace<uint32_t>(1);
  RODIN_CUDA(cudaMemsetAsync(units_taken_, 0, sizeof(uint32_t), stream_));
}

bool CudaOps::moe_joined(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                         const MoeWeights& moe, const float* next_weight, const Tensor& expert_ids,
                         const Tensor& expert_weights, const Tensor& out) {
  const PlacedMoe& placed = *static_cast<const PlacedMoe*>(moe.packed);
  // With --deterministic a token's bits are those of any batch.
  if (is_deterministic_ || out.rows != 1 || !placed.is_uniform ||
      (moe.has_shared() && !placed.is_shared_grouped))
    return false;
  const bool has_shared = moe.has_shared();
  DecodeExperts experts = {.gate = placed.gate, .up = placed.up, .down = placed.down};
  experts.routed_gate = view_of(moe.experts[0].gate);
  experts.routed_down = view_of(moe.experts[0].down);
  if (has_shared) {
    experts.shared_gate = view_of(moe.shared.gate);
    experts.shared_up = view_of(moe.shared.up);
    experts.shared_down = view_of(moe.shared.down);
  }
  const DecodeExpertsParams enter = {.norm = norm_params(residual, &delta, weight, eps, out),
                                     .router = view_of(moe.router),
                                     .route = {.correction_bias = moe.correction_bias,
                                               .expert_ids = expert_ids.row<int32_t>(0),
                                               .ids_stride = expert_ids.stride,
                                               .expert_weights = expert_weights.row<float>(0),
                                               .weights_stride = expert_weights.stride,
                                               .num_tokens = 1,
                                               .route = moe.route},
                                     .experts = experts,
                                     .routed_mid = expert_mid_.data,
                                     .routed_stride = expert_mid_.stride,
                                     .shared_mid = shared_mid_.data,
                                     .taken = units_taken_,
                                     .num_clusters = num_decode_clusters_};
  const DecodeDownParams leave = {.experts = experts,
                                  .expert_ids = expert_ids.row<int32_t>(0),
                                  .expert_weights = expert_weights.row<float>(0),
                                  .routed_mid = expert_mid_.data,
                                  .routed_stride = expert_mid_.stride,
                                  .shared_mid = shared_mid_.data,
                                  .residual = residual.row<float>(0),
                                  .delta = delta.data,
                                  .taken = units_taken_,
                                  .num_experts = static_cast<int32_t>(moe.route.num_experts),
                                  .experts_per_token = static_cast<int32_t>(moe.route.experts_per_token)};
  if (!is_decode_experts(enter) || !is_decode_down(leave)) return false;
  run_decode_experts(enter, stream_);
  run_decode_down(leave, stream_);
  if (next_weight != nullptr) rms_norm(residual, next_weight, eps, out);
  return true;
}

}  // namespace rodin::cuda
