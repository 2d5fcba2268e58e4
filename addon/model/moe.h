// The feed-forward part of one layer: dense, or routed and shared experts.
#pragma once

#include "ops/ops.h"

namespace rodin {

// The norms before and behind the layer.
struct MoeNorms {
  const float* before;  // [H]
  const float* behind;  // [H]
  float eps;
};

// residual += delta; residual += the experts of its norm; out = the norm behind it. residual, out [T, H];
// delta, normed [T, H] and expert_ids, expert_weights [T, k] are working memory; out may be normed. False:
// the norm behind was left to whoever reads out, as may_leave_norm allows.
bool run_moe(Ops& ops, const MoeWeights& moe, const MoeNorms& norms, const Tensor& residual,
             const Tensor& delta, const Tensor& normed, const Tensor& expert_ids,
             const Tensor& expert_weights, const Tensor& out, bool may_leave_norm);

// x, out [T, H]; intermediate [T, I] is working memory.
void run_mlp(Ops& ops, const MlpWeights& mlp, const Tensor& x, const Tensor& intermediate, const Tensor& out);

}  // namespace rodin
