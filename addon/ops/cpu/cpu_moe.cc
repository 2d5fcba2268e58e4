// Routing and the mixture of experts. Pairs (token, expert) are grouped by expert, so that a weight row is
// read once for all tokens that chose its expert; the shared expert is one more group with every token. Two
// passes over the pool: gate and up; then down, where a task owns a strip of outputs and adds up each token's
// slots in order.
#include <algorithm>

#include "ops/cpu/cpu_ops.h"

namespace rodin {
namespace {

// Rows that gate and up take at once.
constexpr int64_t kStrip = 64;

}  // namespace

void CpuOps::route(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
                   const Tensor& expert_weights) {
  const int64_t num_experts = moe.route.num_experts;
  for_parts(x.rows, num_experts * x.cols, [&](int64_t first, int64_t end, Worker& worker) {
    float* working = worker.scores + kRouteTokens * num_experts;
    LinearArgs args;
    args.weight = &moe.router;
    args.rows = num_experts;
    args.x = worker.x;
    args.out = worker.out;
    args.panel = worker.panel;
    for (int64_t begin = first; begin < end; begin += kRouteTokens) {
      args.m = std::min(kRouteTokens, end - begin);
      for (int64_t i = 0; i < args.m; ++i) {
        worker.x[i] = x.row<float>(begin + i);
        worker.out[i] = worker.scores + i * num_experts;
      }
      kernels_.linear(args);
      for (int64_t i = 0; i < args.m; ++i) {
        float* scores = worker.out[i];
        if (moe.route.scoring_func == ScoringFunc::kSigmoid) {
          kernels_.sigmoid(scores, num_experts);
        } else {
          kernels_.softmax(scores, num_experts);
        }
        choose_experts(scores, moe, working, working + num_experts, expert_ids.row<int32_t>(begin + i),
                       expert_weights.row<float>(begin + i));
      }
    }
  });
}

// Sorts the pairs by expert, keeping the order of tokens, and points x_rows_, x_bf16_ and out_rows_ at their
// inputs and at their rows of expert_hidden_.
void CpuOps::group_pairs(const Tensor& x, const Tensor& expert_ids, const MoeWeights& moe) {
  const int64_t num_experts = moe.route.num_experts;
  const int64_t num_slots = expert_ids.cols;
  const int64_t inner = moe.experts[0].gate.rows;
  take_inputs(x);  // rounds every token once; the rows are pointed at anew, pair by pair
  const auto point_pair = [&](int64_t pair, int64_t t) {
    x_rows_[pair] = x.row<float>(t);
    if (x_bf16_ == nullptr) return;
    x_bf16_[pair] = inputs_bf16_ + t * bf16_stride_;
    hidden_rows_[pair] = hidden_bf16_ + pair * hidden_stride_;
  };
  std::fill(expert_start_.begin(), expert_start_.end(), 0);
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t j = 0; j < num_slots; ++j)
      ++expert_start_[static_cast<size_t>(expert_ids.row<int32_t>(t)[j]) + 1];
  }
  active_experts_.clear();
  for (int64_t e = 0; e < num_experts; ++e) {
    const auto at = static_cast<size_t>(e);
    if (expert_start_[at + 1] > 0) active_experts_.push_back(e);
    expert_start_[at + 1] += expert_start_[at];
  }
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t j = 0; j < num_slots; ++j) {
      const int64_t pair = expert_start_[static_cast<size_t>(expert_ids.row<int32_t>(t)[j])]++;
      pair_of_slot_[static_cast<size_t>(t * num_slots + j)] = pair;
      pair_token_[static_cast<size_t>(pair)] = t;
      point_pair(pair, t);
      out_rows_[pair] = expert_hidden_ + pair * inner;
    }
  }
  // Each start has moved on to the next expert's: move them back.
  for (size_t e = static_cast<size_t>(num_experts); e > 0; --e) expert_start_[e] = expert_start_[e - 1];
  expert_start_[0] = 0;
  const int64_t num_pairs = x.rows * num_slots;
  expert_start_[static_cast<size_t>(num_experts)] = num_pairs;
  expert_start_[static_cast<size_t>(num_experts) + 1] = num_pairs;
  if (!moe.has_shared()) return;
  active_experts_.push_back(num_experts);
  expert_start_[static_cast<size_t>(num_experts) + 1] = num_pairs + x.rows;
  for (int64_t t = 0; t < x.rows; ++t) {
    pair_token_[static_cast<size_t>(num_pairs + t)] = t;
    point_pair(num_pairs + t, t);
    out_rows_[num_pairs + t] = expert_hidden_ + num_pairs * inner + t * moe.shared.gate.rows;
  }
}

void CpuOps::moe(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
                 const Tensor& expert_weights, const Tensor& out) {
  const int64_t num_experts = moe.route.num_experts;
  const int64_t num_slots = expert_ids.cols;
  group_pairs(x, expert_ids, moe);
  const auto mlp_of = [&](int64_t e) -> const MlpWeights& {
    return e < num_experts ? moe.experts[static_cast<size_t>(e)] : moe.shared;
  };
  const auto first_pair = [&](int64_t e) { return expert_start_[static_cast<size_t>(e)]; };
  const auto num_pairs = [&](int64_t e) { return first_pair(e + 1) - first_pair(e); };

  // Gate and up: each active expert's rows in pieces of whole strips.
  const int64_t inner = moe.experts[0].gate.rows;
  const auto num_routed = static_cast<int64_t>(active_experts_.size()) - (moe.has_shared() ? 1 : 0);
  const int64_t shared_rows = moe.has_shared() ? moe.shared.gate.rows : 0;
  const int64_t all_strips = num_routed * ceil_div(inner, kStrip) + ceil_div(shared_rows, kStrip);
  const int64_t piece = kStrip * std::max<int64_t>(1, all_strips / (kTasksPerWorker * pool_.num_threads()));
  const int64_t pieces = ceil_div(inner, piece);
  const int64_t shared_pieces = ceil_div(shared_rows, piece);
  pool_.parallel_for(num_routed * pieces + shared_pieces, [&](int64_t task, int worker) {
    const bool is_shared = task >= num_routed * pieces;
    const int64_t e = is_shared ? num_experts : active_experts_[static_cast<size_t>(task / pieces)];
    const int64_t row0 = piece * (is_shared ? task - num_routed * pieces : task % pieces);
    const int64_t rows = std::min(piece, mlp_of(e).gate.rows - row0);
    run_gate_up(mlp_of(e), first_pair(e), num_pairs(e), row0, rows, x_bf16_ != nullptr,
                workers_[static_cast<size_t>(worker)]);
  });

  // Down: a strip of outputs of every pair, then of every token.
  const int64_t shared_pairs = x.rows * num_slots;
  pool_.parallel_for(ceil_div(out.cols, down_strip_), [&](int64_t task, int worker_id) {
    Worker& worker = workers_[static_cast<size_t>(worker_id)];
    const int64_t col = task * down_strip_;
    const int64_t cols = std::min(down_strip_, out.cols - col);
    LinearArgs args;
    args.row0 = col;
    args.rows = cols;
    args.out_row0 = col;
    args.panel = worker.panel;
    for (size_t i = 0; i < active_experts_.size(); ++i) {
      const int64_t e = active_experts_[i];
      for (int64_t pair = first_pair(e); pair < first_pair(e + 1); ++pair) {
        worker.out[pair] = worker.pairs + pair * down_strip_;
      }
      args.weight = &mlp_of(e).down;
      args.x = out_rows_ + first_pair(e);
      if (hidden_rows_) args.x_bf16 = hidden_rows_ + first_pair(e);
      args.out = worker.out + first_pair(e);
      args.m = num_pairs(e);
      args.next_panels = nullptr;
      if (i + 1 < active_experts_.size()) ask_for_next(args, mlp_of(active_experts_[i + 1]).down, col);
      kernels_.linear(args);
    }
    for (int64_t t = 0; t < x.rows; ++t) {
      for (int64_t j = 0; j < num_slots; ++j) {
        const int64_t pair = pair_of_slot_[static_cast<size_t>(t * num_slots + j)];
        worker.x[j] = worker.pairs + pair * down_strip_;
      }
      const float* shared = moe.has_shared() ? worker.pairs + (shared_pairs + t) * down_strip_ : nullptr;
      kernels_.weighted_sum(worker.x, expert_weights.row<float>(t), num_slots, shared, cols,
                            out.row<float>(t) + col);
    }
  });
}

}  // namespace rodin
