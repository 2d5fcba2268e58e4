#include "model/moe.h"

namespace rodin {

bool run_moe(Ops& ops, const MoeWeights& moe, const MoeNorms& norms, const Tensor& residual,
             const Tensor& delta, const Tensor& normed, const Tensor& expert_ids,
             const Tensor& expert_weights, const Tensor& out, bool may_leave_norm) {
  if (ops.moe_joined(residual, delta, norms.before, norms.eps, moe, may_leave_norm ? nullptr : norms.behind,
                     expert_ids, expert_weights, out))
    return !may_leave_norm;
  ops.add_rms_norm_route(residual, delta, norms.before, norms.eps, normed, moe, expert_ids, expert_weights);
  ops.moe_add_rms_norm(normed, moe, expert_ids, expert_weights, delta, residual, norms.behind, norms.eps,
                       out);
  return true;
}

void run_mlp(Ops& ops, const MlpWeights& mlp, const Tensor& x, const Tensor& intermediate,
             const Tensor& out) {
  ops.gate_up_silu(x, mlp, intermediate);
  ops.linear(intermediate, mlp.down, out);
}

}  // namespace rodin
