#include "model/moe.h"

namespace rodin {

void run_moe(Ops& ops, const MoeWeights& moe, const Tensor& x, const Tensor& expert_ids,
             const Tensor& expert_weights, const Tensor& out) {
  ops.route(x, moe, expert_ids, expert_weights);
  ops.moe(x, moe, expert_ids, expert_weights, out);
}

void run_mlp(Ops& ops, const MlpWeights& mlp, const Tensor& x, const Tensor& intermediate,
             const Tensor& out) {
  ops.gate_up_silu(x, mlp, intermediate);
  ops.linear(intermediate, mlp.down, out);
}

}  // namespace rodin
