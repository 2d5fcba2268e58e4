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
// Pairs whose products with a row take about as long as reading it.
constexpr int64_t kReadPairs = 16;

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

// Cuts the rows of gate and up of the active experts into pieces of whole strips that take about equally
// long. The shared expert, which has most pairs, comes first: what is begun last should be over soon.
template <class F>
void CpuOps::cut_experts(const F& mlp_of) {
  const auto cost_of_row = [&](int64_t e) {
    const auto at = static_cast<size_t>(e);
    return expert_start_[at + 1] - expert_start_[at] + kReadPairs;
  };
  int64_t cost = 0;
  for (int64_t e : active_experts_) cost += mlp_of(e).gate.rows * cost_of_row(e);
  const int64_t wanted = ceil_div(cost, kTasksPerWorker * pool_.num_threads());
  expert_pieces_.clear();
  for (auto it = active_experts_.rbegin(); it != active_experts_.rend(); ++it) {
    const int64_t rows = mlp_of(*it).gate.rows;
    const int64_t strips = ceil_div(rows, kStrip);
    const int64_t count = std::clamp<int64_t>(rows * cost_of_row(*it) / wanted, 1, strips);
    const int64_t piece = kStrip * ceil_div(strips, count);
    for (int64_t row0 = 0; row0 < rows; row0 += piece) {
      expert_pieces_.push_back({*it, row0, std::min(piece, rows - row0)});
    }
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

  cut_experts(mlp_of);
  pool_.parallel_for(static_cast<int64_t>(expert_pieces_.size()), [&](int64_t task, int worker) {
    const ExpertPiece& piece = expert_pieces_[static_cast<size_t>(task)];
    run_gate_up(mlp_of(piece.expert), first_pair(piece.expert), num_pairs(piece.expert), piece.row0,
                piece.rows, x_bf16_ != nullptr, workers_[static_cast<size_t>(worker)]);
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
