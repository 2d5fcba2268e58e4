// Routing and the mixture of experts, one token and one expert at a time.
#include <cmath>

#include "ops/cpu/reference_ops.h"

namespace rodin {

void ReferenceOps::route(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
                         const Tensor& expert_weights) {
  const auto num_experts = static_cast<size_t>(moe.route.num_experts);
  std::vector<float> score_data(static_cast<size_t>(x.rows) * num_experts);    // [T, E]
  std::vector<float> choice(num_experts);                                      // [E]
  std::vector<float> group_scores(static_cast<size_t>(moe.route.num_groups));  // [num_groups]
  const auto cols = static_cast<int64_t>(num_experts);
  const Tensor scores{score_data.data(), Dtype::kF32, x.rows, cols, cols};
  linear(x, moe.router, scores);
  for (int64_t t = 0; t < x.rows; ++t) {
    float* row = scores.row<float>(t);
    if (moe.route.scoring_func == ScoringFunc::kSigmoid) {
      for (int64_t e = 0; e < cols; ++e) row[e] = 1.0f / (1.0f + std::exp(-row[e]));
    } else {
      float max = row[0];
      for (int64_t e = 1; e < cols; ++e) max = row[e] > max ? row[e] : max;
      double sum = 0;
      for (int64_t e = 0; e < cols; ++e) sum += row[e] = std::exp(row[e] - max);
      for (int64_t e = 0; e < cols; ++e) row[e] = static_cast<float>(row[e] / sum);
    }
    choose_experts(row, moe, choice.data(), group_scores.data(), expert_ids.row<int32_t>(t),
                   expert_weights.row<float>(t));
  }
}

void ReferenceOps::moe(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
                       const Tensor& expert_weights, const Tensor& out) {
  const int64_t num_slots = expert_ids.cols;
  // One expert's outputs for all its tokens, kept apart per slot so that the sum over slots has one order.
  std::vector<float> slot_data(static_cast<size_t>(x.rows * num_slots * out.cols));  // [T, k, H]
  for (size_t e = 0; e < moe.experts.size(); ++e) {
    std::vector<int64_t> pairs;  // t * k + slot of the tokens that chose expert e
    for (int64_t t = 0; t < x.rows; ++t) {
      for (int64_t j = 0; j < num_slots; ++j) {
        if (expert_ids.row<int32_t>(t)[j] == static_cast<int32_t>(e)) pairs.push_back(t * num_slots + j);
      }
    }
    if (pairs.empty()) continue;
    const MlpWeights& mlp = moe.experts[e];
    const auto count = static_cast<int64_t>(pairs.size());
    std::vector<float> in_data(static_cast<size_t>(count * x.cols));          // [pairs, H]
    std::vector<float> mid_data(static_cast<size_t>(count * mlp.gate.rows));  // [pairs, I]
    std::vector<float> out_data(static_cast<size_t>(count * out.cols));       // [pairs, H]
    const Tensor in{in_data.data(), Dtype::kF32, count, x.cols, x.cols};
    const Tensor mid{mid_data.data(), Dtype::kF32, count, mlp.gate.rows, mlp.gate.rows};
    const Tensor result{out_data.data(), Dtype::kF32, count, out.cols, out.cols};
    for (int64_t i = 0; i < count; ++i) {
      const float* from = x.row<float>(pairs[static_cast<size_t>(i)] / num_slots);
      for (int64_t c = 0; c < x.cols; ++c) in.row<float>(i)[c] = from[c];
    }
    gate_up_silu(in, mlp, mid);
    linear(mid, mlp.down, result);
    for (int64_t i = 0; i < count; ++i) {
      float* to = slot_data.data() + pairs[static_cast<size_t>(i)] * out.cols;
      for (int64_t c = 0; c < out.cols; ++c) to[c] = result.row<float>(i)[c];
    }
  }
  if (moe.has_shared()) {
    std::vector<float> mid_data(static_cast<size_t>(x.rows * moe.shared.gate.rows));  // [T, Is]
    const Tensor mid{mid_data.data(), Dtype::kF32, x.rows, moe.shared.gate.rows, moe.shared.gate.rows};
    gate_up_silu(x, moe.shared, mid);
    linear(mid, moe.shared.down, out);
  }
  for (int64_t t = 0; t < x.rows; ++t) {
    float* to = out.row<float>(t);
    for (int64_t c = 0; c < out.cols; ++c) {
      float sum = 0;
      for (int64_t j = 0; j < num_slots; ++j) {
        sum += expert_weights.row<float>(t)[j] *
               slot_data[static_cast<size_t>((t * num_slots + j) * out.cols + c)];
      }
      to[c] = moe.has_shared() ? sum + to[c] : sum;
    }
  }
}

}  // namespace rodin
