#include "ops/cpu/cpu_ops.h"

#include <algorithm>

#include "ops/cpu/cpu_path.h"

namespace rodin {
namespace {

// Rows of a task are a multiple of the rows that a kernel takes at once.
constexpr int64_t kRowGroup = 64;

// Multiply-adds beside which taking a task costs little, where all workers get one.
constexpr int64_t kGoodTaskWork = 64 * 1024;

// Rows in bf16 start at multiples of this.
constexpr int64_t kBf16Align = 32;

constexpr int64_t kMaxChunkTokens = 256;
constexpr int64_t kMaxDownStrip = 256;
constexpr int64_t kMinParts = 1024;
constexpr int64_t kPartsPerWorker = 16;

}  // namespace

CpuOps::CpuOps(const std::string& cpu_path, int num_threads)
    : CpuOps(kernels_of_path(cpu_path), num_threads) {}

CpuOps::CpuOps(const Kernels& kernels, int num_threads) : HostOps(num_threads), kernels_(kernels) {}

CpuOps::~CpuOps() {
  for (void* buffer : buffers_) free(buffer);
}

std::string CpuOps::name() const { return std::string("cpu (") + kernels_.name + ")"; }

size_t CpuOps::reserve(const OpsLimits& limits) {
  size_t bytes = HostOps::reserve(limits);
  const auto make = [&]<class T>(T*& pointer, int64_t count) {
    const size_t size = static_cast<size_t>(count) * sizeof(T);
    pointer = static_cast<T*>(alloc(size));
    buffers_.push_back(pointer);
    bytes += size;
  };
  if (limits.gqa.num_heads > 0) {
    gqa_ = std::make_unique<CpuGqa>(kernels_, pool_, limits.gqa, limits.max_step_tokens);
    bytes += gqa_->bytes();
  }
  if (caches_expanded(limits.mla)) {
    expanded_mla_ = std::make_unique<CpuExpandedMla>(kernels_, pool_, limits.mla, limits.block_size,
                                                     limits.max_step_tokens);
    bytes += expanded_mla_->bytes();
  }
  const MlaShape& mla = limits.mla;
  const int64_t tokens = limits.max_step_tokens;
  const int64_t slots = limits.num_experts > 0 ? limits.experts_per_token : 0;
  const int64_t max_pairs = tokens * (slots + 1);
  const int64_t max_inputs = std::max({limits.max_linear_inputs, limits.hidden_size, mla.lora_rank});
  chunk_tokens_ = std::min(tokens, kMaxChunkTokens);
  max_parts_ = std::max(kMinParts, kPartsPerWorker * pool_.num_threads());

  // Two strips a worker at least; wider ones read the inputs of all pairs less often.
  const int64_t even_strip = limits.hidden_size / (2 * pool_.num_threads()) / kRowGroup * kRowGroup;
  down_strip_ = std::clamp(even_strip, kRowGroup, kMaxDownStrip);

  workers_.resize(static_cast<size_t>(pool_.num_threads()));
  for (Worker& worker : workers_) {
    make(worker.panel, std::max({kPanelRows * round_up(max_inputs, kPanelAlign), kMinPanelFloats,
                                 mla.nope_dim * mla.lora_rank}));
    make(worker.scaled, 4 * mla.nope_dim);
    make(worker.part, kernels_.query_tile * mla.lora_rank);
    make(worker.pairs, max_pairs * std::max(2 * kRowGroup, down_strip_));
    make(worker.x, max_pairs);
    make(worker.out, max_pairs);
    make(worker.gate, max_pairs);
    make(worker.scores, (kRouteTokens + 2) * limits.num_experts);
  }
  bf16_stride_ = bf16_row_stride(max_inputs);
  hidden_stride_ = bf16_row_stride(std::max(limits.moe_intermediate_size, limits.shared_intermediate_size));
  if (kernels_.to_bf16) {
    make(x_bf16_, max_pairs);
    make(inputs_bf16_, tokens * bf16_stride_);
    for (Worker& worker : workers_) {
      make(worker.rows_bf16, chunk_tokens_ * bf16_row_stride(std::max(mla.lora_rank, mla.nope_dim)));
      make(worker.x_bf16, std::max(chunk_tokens_, tokens));
      if (kernels_.needs_rows_in_line && slots > 0) make(worker.gathered, tokens * bf16_stride_);
      make(worker.scratch_bf16, (kMaxQueryTile + kKeyTile) * round_up(mla.latent_dim(), kBf16Align));
    }
    if (slots > 0) {
      make(hidden_bf16_, max_pairs * hidden_stride_);
      make(hidden_rows_, max_pairs);
    }
  }
  make(x_rows_, max_pairs);
  make(out_rows_, max_pairs);
  make(out_rows1_, tokens);
  make(query_latents_, chunk_tokens_ * mla.num_heads * mla.latent_dim());
  make(value_latents_, chunk_tokens_ * mla.num_heads * mla.lora_rank);
  make(softmax_max_, chunk_tokens_ * mla.num_heads);
  make(softmax_sum_, chunk_tokens_ * mla.num_heads);
  make(parts_, max_parts_ * mla.lora_rank);
  make(parts_max_, max_parts_);
  make(parts_sum_, max_parts_);
  if (limits.num_experts > 0) {
    expert_start_.resize(static_cast<size_t>(limits.num_experts) + 2);
    active_experts_.reserve(static_cast<size_t>(limits.num_experts) + 1);
    const int64_t most_pieces = limits.num_experts * ceil_div(limits.moe_intermediate_size, kRowGroup) +
                                ceil_div(limits.shared_intermediate_size, kRowGroup);
    expert_pieces_.reserve(static_cast<size_t>(most_pieces));
    pair_of_slot_.resize(static_cast<size_t>(tokens * slots));
    pair_token_.resize(static_cast<size_t>(max_pairs));
    make(expert_hidden_, tokens * (slots * limits.moe_intermediate_size + limits.shared_intermediate_size));
  }
  return bytes;
}

CpuOps::RowTasks CpuOps::cut_rows(int64_t num_rows, int64_t num_inputs, int64_t m) const {
  const int64_t row_work = num_inputs * m;
  const int64_t num_threads = pool_.num_threads();
  if (num_threads == 1 || num_rows * row_work < kMinParallelWork) return {num_rows, num_rows > 0 ? 1 : 0};
  const int64_t even = ceil_div(num_rows, num_threads * kTasksPerWorker);
  const int64_t worthwhile = std::min(ceil_div(kGoodTaskWork, row_work), ceil_div(num_rows, num_threads));
  const int64_t rows = round_up(std::max({even, worthwhile, ceil_div(kMinTaskWork, row_work)}), kRowGroup);
  return {rows, ceil_div(num_rows, rows)};
}

void CpuOps::embed(const Weight& table, const StepIndex& index, const Tensor& out) {
  for_parts(out.rows, out.cols, [&](int64_t first, int64_t end, Worker&) {
    for (int64_t t = first; t < end; ++t) kernels_.widen_row(table, index.token_ids[t], out.row<float>(t));
  });
}

void CpuOps::rms_norm(const Tensor& x, const float* weight, float eps, const Tensor& out) {
  for_parts(x.rows, x.cols, [&](int64_t first, int64_t end, Worker&) {
    for (int64_t t = first; t < end; ++t) {
      kernels_.rms_norm(x.row<float>(t), weight, eps, x.cols, out.row<float>(t));
    }
  });
}

void CpuOps::add_rms_norm(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                          const Tensor& out) {
  for_parts(residual.rows, 2 * residual.cols, [&](int64_t first, int64_t end, Worker&) {
    for (int64_t t = first; t < end; ++t) {
      kernels_.add(residual.row<float>(t), delta.row<float>(t), residual.cols);
      kernels_.rms_norm(residual.row<float>(t), weight, eps, residual.cols, out.row<float>(t));
    }
  });
}

void CpuOps::run_linear(const Weight& weight, const RowTasks& tasks, int64_t task, int64_t m,
                        float* const* out, Worker& worker) {
  LinearArgs args;
  args.weight = &weight;
  args.row0 = task * tasks.rows_per_task;
  args.rows = std::min(tasks.rows_per_task, weight.rows - args.row0);
  args.x = x_rows_;
  args.x_bf16 = x_bf16_;
  args.out = out;
  args.m = m;
  args.panel = worker.panel;
  kernels_.linear(args);
}

void CpuOps::take_inputs(const Tensor& x) {
  for (int64_t t = 0; t < x.rows; ++t) x_rows_[t] = x.row<float>(t);
  if (x_bf16_ == nullptr) return;
  for_parts(x.rows, x.cols / 8, [&](int64_t first, int64_t end, Worker&) {
    for (int64_t t = first; t < end; ++t) {
      uint16_t* to = inputs_bf16_ + t * bf16_stride_;
      x_bf16_[t] = to;
      kernels_.to_bf16(x_rows_[t], x.cols, to);
    }
  });
}

void CpuOps::linear(const Tensor& x, const Weight& weight, const Tensor& out) {
  take_inputs(x);
  for (int64_t t = 0; t < x.rows; ++t) out_rows_[t] = out.row<float>(t);
  const RowTasks tasks = cut_rows(weight.rows, weight.cols, x.rows);
  pool_.parallel_for(tasks.num_tasks, [&](int64_t task, int worker) {
    run_linear(weight, tasks, task, x.rows, out_rows_, workers_[static_cast<size_t>(worker)]);
  });
}

void CpuOps::linear_pair(const Tensor& x, const Weight& weight0, const Tensor& out0, const Weight& weight1,
                         const Tensor& out1) {
  take_inputs(x);
  for (int64_t t = 0; t < x.rows; ++t) {
    out_rows_[t] = out0.row<float>(t);
    out_rows1_[t] = out1.row<float>(t);
  }
  const RowTasks tasks0 = cut_rows(weight0.rows, weight0.cols, x.rows);
  const RowTasks tasks1 = cut_rows(weight1.rows, weight1.cols, x.rows);
  pool_.parallel_for(tasks0.num_tasks + tasks1.num_tasks, [&](int64_t task, int worker_id) {
    Worker& worker = workers_[static_cast<size_t>(worker_id)];
    if (task < tasks0.num_tasks) {
      run_linear(weight0, tasks0, task, x.rows, out_rows_, worker);
    } else {
      run_linear(weight1, tasks1, task - tasks0.num_tasks, x.rows, out_rows1_, worker);
    }
  });
}

void CpuOps::gqa_rope_store(const Tensor& q, const Tensor& kv, const GqaShape&, const Tensor& rope_table,
                            const StepIndex& index, const CacheLayer& cache) {
  gqa_->rope_store(q, kv, rope_table, index, cache);
}

void CpuOps::gqa_attention(const Tensor& q, const GqaShape&, const StepIndex& index, const CacheLayer& cache,
                           const Tensor& out) {
  gqa_->attention(q, index, cache, out);
}

void CpuOps::gate_up_silu(const Tensor& x, const MlpWeights& mlp, const Tensor& out) {
  take_inputs(x);
  for (int64_t t = 0; t < x.rows; ++t) out_rows_[t] = out.row<float>(t);
  const RowTasks tasks = cut_rows(mlp.gate.rows, 2 * mlp.gate.cols, x.rows);
  pool_.parallel_for(tasks.num_tasks, [&](int64_t task, int worker) {
    const int64_t row0 = task * tasks.rows_per_task;
    const int64_t rows = std::min(tasks.rows_per_task, mlp.gate.rows - row0);
    run_gate_up(mlp, 0, x.rows, row0, rows, false, workers_[static_cast<size_t>(worker)]);
  });
}

void CpuOps::ask_for_next(LinearArgs& args, const Weight& weight, int64_t row) {
  args.next_panels = nullptr;
  if (weight.packed == nullptr || row >= weight.rows) return;
  args.next_panel_bytes = panel_bytes(kPanelOutputs, weight.cols, weight.dtype);
  args.next_panels = static_cast<const char*>(weight.packed) + row / kPanelOutputs * args.next_panel_bytes;
}

// The rounded inputs of an expert's pairs, equally far apart: as they are, or copied.
const uint16_t* const* CpuOps::gather_rows_bf16(int64_t first_pair, int64_t num_pairs, int64_t cols,
                                                Worker& worker) const {
  const uint16_t* const* rows = x_bf16_ + first_pair;
  bool is_in_line = true;
  for (int64_t i = 1; i < num_pairs; ++i) is_in_line = is_in_line && rows[i] == rows[0] + i * bf16_stride_;
  if (is_in_line) return rows;
  for (int64_t i = 0; i < num_pairs; ++i) {
    uint16_t* to = worker.gathered + i * bf16_stride_;
    std::copy_n(rows[i], round_up(cols, kBf16Align), to);
    worker.x_bf16[i] = to;
  }
  return worker.x_bf16;
}

// Rows row0 .. row0 + rows - 1 of silu(gate(x)) * up(x) for the inputs first_pair .. of x_rows_, to
// out_rows_, and where is_rounded to the rows of hidden_bf16_ too: to those alone where the down pass reads
// them.
void CpuOps::run_gate_up(const MlpWeights& mlp, int64_t first_pair, int64_t num_pairs, int64_t row0,
                         int64_t rows, bool is_rounded, Worker& worker) {
  const bool is_kept = !is_rounded || mlp.down.packed == nullptr;
  for (int64_t i = 0; i < num_pairs; ++i) {
    worker.gate[i] = worker.pairs + i * 2 * kRowGroup;
    worker.out[i] = worker.gate[i] + kRowGroup;
  }
  LinearArgs args;
  args.x = x_rows_ + first_pair;
  if (x_bf16_) args.x_bf16 = x_bf16_ + first_pair;
  if (is_rounded && kernels_.needs_rows_in_line)
    args.x_bf16 = gather_rows_bf16(first_pair, num_pairs, mlp.gate.cols, worker);
  args.m = num_pairs;
  args.panel = worker.panel;
  for (int64_t row = row0; row < row0 + rows; row += kRowGroup) {
    args.row0 = row;
    args.rows = std::min(kRowGroup, row0 + rows - row);
    args.weight = &mlp.gate;
    args.out = is_kept ? out_rows_ + first_pair : worker.gate;
    args.out_row0 = is_kept ? 0 : row;
    ask_for_next(args, mlp.up, row);
    kernels_.linear(args);
    args.weight = &mlp.up;
    args.out = worker.out;
    args.out_row0 = row;
    ask_for_next(args, mlp.gate, row + kRowGroup);
    kernels_.linear(args);
    for (int64_t i = 0; i < num_pairs; ++i) {
      float* to = is_kept ? out_rows_[first_pair + i] + row : worker.gate[i];
      kernels_.silu_mul(to, worker.out[i], args.rows, to);
      if (!is_rounded) continue;
      kernels_.to_bf16(to, args.rows, hidden_bf16_ + (first_pair + i) * hidden_stride_ + row);
    }
  }
}

}  // namespace rodin
