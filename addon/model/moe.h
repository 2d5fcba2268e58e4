// The feed-forward part of one layer: dense, or routed and shared experts.
#pragma once

#include "ops/ops.h"

namespace rodin {

// x, out [T, H]; expert_ids, expert_weights [T, k] are working memory.
void run_moe(Ops& ops, const MoeWeights& moe, const Tensor& x, const Tensor& expert_ids,
             const Tensor& expert_weights, const Tensor& out);

// x, out [T, H]; intermediate [T, I] is working memory.
void run_mlp(Ops& ops, const MlpWeights& mlp, const Tensor& x, const Tensor& intermediate, const Tensor& out);

}  // namespace rodin
