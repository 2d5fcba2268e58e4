// CpuOps: the fast CPU path. Activations and sums are float32, weights stay as they are in memory, latents
// are cached in 16 bits and attention is absorbed, unless expanded keys and values take no more room
// (cpu_expanded_mla.h). The arithmetic is in the kernels (one table per instruction
// path); this class cuts the work into tasks, which never changes a result.
#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "ops/cpu/cpu_expanded_mla.h"
#include "ops/cpu/cpu_gqa.h"
#include "ops/cpu/host_ops.h"
#include "ops/cpu/kernels.h"
#include "ops/cpu/packed_weight.h"

namespace rodin {

// Elements from one row in bf16 to the next, of at least n: an odd number of cache lines, as neighbouring
// rows would else take turns in few places of a cache.
inline int64_t bf16_row_stride(int64_t n) { return (ceil_div(n, 32) | 1) * 32; }

class CpuOps final : public HostOps {
 public:
  // cpu_path is "auto" or one of supported_cpu_paths().
  CpuOps(const std::string& cpu_path, int num_threads);
  CpuOps(const Kernels& kernels, int num_threads);
  ~CpuOps() override;

  std::string name() const override;
  Dtype cache_dtype() const override { return kernels_.cache_dtype; }
  Ceilings measure_ceilings() override;
  // On a path that takes packed weights the placed ones are copies; routers and tables of embeddings stay.
  using HostOps::place;
  void place(Weight& weight) override;
  void place(MoeWeights& moe) override;
  void place(MlaWeights& mla) override;
  void place_table(Weight&) override {}
  bool is_copied(const Weight& weight) const override { return weight.packed != nullptr; }
  size_t reserve(const OpsLimits& limits) override;

  void embed(const Weight& table, const StepIndex& index, const Tensor& out) override;
  void rms_norm(const Tensor& x, const float* weight, float eps, const Tensor& out) override;
  void add_rms_norm(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                    const Tensor& out) override;
  void linear(const Tensor& x, const Weight& weight, const Tensor& out) override;
  void linear_pair(const Tensor& x, const Weight& weight0, const Tensor& out0, const Weight& weight1,
                   const Tensor& out1) override;
  void gate_up_silu(const Tensor& x, const MlpWeights& mlp, const Tensor& out) override;
  void mla_rope_store(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                      const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache) override;
  bool has_mla_store() const override { return true; }
  void mla_store(const Tensor& kv, const MlaWeights& mla, float eps, const Tensor& rope_table,
                 const StepIndex& index, const CacheLayer& cache) override;
  void mla_attention(const Tensor& q, const MlaWeights& mla, const StepIndex& index, const CacheLayer& cache,
                     const Tensor& out) override;
  bool has_gqa() const override { return true; }
  void gqa_rope_store(const Tensor& q, const Tensor& kv, const GqaShape& shape, const Tensor& rope_table,
                      const StepIndex& index, const CacheLayer& cache) override;
  void gqa_attention(const Tensor& q, const GqaShape& shape, const StepIndex& index, const CacheLayer& cache,
                     const Tensor& out) override;
  void route(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
             const Tensor& expert_weights) override;
  void moe(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids, const Tensor& expert_weights,
           const Tensor& out) override;

 private:
  // Below this many multiply-adds an op is not worth waking the other workers.
  static constexpr int64_t kMinParallelWork = 16 * 1024;
  // A task should have at least this many.
  static constexpr int64_t kMinTaskWork = 8 * 1024;
  static constexpr int64_t kTasksPerWorker = 8;
  // Tokens that are routed by one product.
  static constexpr int64_t kRouteTokens = 16;

  // Working memory of one worker of the pool.
  struct Worker {
    float* panel = nullptr;             // [kPanelRows, max inputs] of linear; [nope_dim, lora_rank] of absorb
    float* scaled = nullptr;            // [4, nope_dim]
    float* part = nullptr;              // [query_tile, lora_rank] one tile of attention
    uint16_t* rows_bf16 = nullptr;      // [chunk_tokens, max(lora_rank, nope_dim) rounded up] of attention
    const uint16_t** x_bf16 = nullptr;  // [chunk_tokens]
    uint16_t* gathered = nullptr;       // [T, bf16_stride_] inputs of one expert, in line
    uint16_t* scratch_bf16 = nullptr;   // [kMaxQueryTile + kKeyTile, latent_dim rounded up]
    float* pairs = nullptr;             // [max pairs, down_strip_] of every (token, expert) pair; gate and up
    const float** x = nullptr;          // [max rows]
    float** out = nullptr;              // [max rows]
    float** gate = nullptr;             // [max rows]
    float* scores = nullptr;            // [kRouteTokens + 2, E] routing
  };

  // A weight's rows cut into equal tasks.
  struct RowTasks {
    int64_t rows_per_task = 0;
    int64_t num_tasks = 0;
  };
  RowTasks cut_rows(int64_t num_rows, int64_t num_inputs, int64_t m) const;

  // Calls fn(first, end, worker) for parts of 0 .. count-1; `cost` is the work of one item in multiply-adds.
  template <class F>
  void for_parts(int64_t count, int64_t cost, const F& fn) {
    const int64_t num_threads = pool_.num_threads();
    if (num_threads == 1 || count * cost < kMinParallelWork) {
      if (count > 0) fn(int64_t{0}, count, workers_[0]);
      return;
    }
    const int64_t even = ceil_div(count, num_threads * kTasksPerWorker);
    const int64_t items = std::max(even, ceil_div(kMinTaskWork, cost));
    pool_.parallel_for(ceil_div(count, items), [&](int64_t task, int worker) {
      fn(task * items, std::min(count, (task + 1) * items), workers_[static_cast<size_t>(worker)]);
    });
  }

  void run_linear(const Weight& weight, const RowTasks& tasks, int64_t task, int64_t m, float* const* out,
                  Worker& worker);
  // What follows the call with `args`: the rows of `weight` from `row` on.
  static void ask_for_next(LinearArgs& args, const Weight& weight, int64_t row);
  // Points x_rows_ at the rows of x, and x_bf16_ at those rounded to bf16 where this path takes them.
  void take_inputs(const Tensor& x);

  void store_latent(int64_t token, const Tensor& kv, const MlaWeights& mla, float eps, const float* angles,
                    const StepIndex& index, const CacheLayer& cache) const;  // [rope_dim]
  void store_expanded(const Tensor& kv, const MlaWeights& mla, float eps, const Tensor& rope_table,
                      const StepIndex& index, const CacheLayer& cache);
  struct Attention;  // one chunk of tokens of one mla_attention call
  void absorb_queries(const Attention& at);
  void absorb_packed(const Weight& key, const MlaShape& shape, int64_t count, Worker& worker) const;
  void attend_rows_in_order(const Attention& at);
  void attend_split(const Attention& at);
  void apply_values(const Attention& at);
  // Keys of a tile at absolute positions that a token attends to: first .. end - 1 of it.
  struct KeyTile {
    const uint16_t* keys[kKeyTile];  // [kKeyTile] cache rows
    int64_t first;
    int64_t end;
  };
  static KeyTile key_tile(const Attention& at, int64_t token, int64_t tile);
  void attend_tile(const Attention& at, int64_t token, int64_t head, const KeyTile& tile, const KeyTile* next,
                   bool has_queries, Worker& worker, float* const* out, float* max, float* sum) const;

  // Some rows of an active expert's gate and up.
  struct ExpertPiece {
    int64_t expert;
    int64_t row0;
    int64_t rows;
  };
  template <class F>
  void cut_experts(const F& mlp_of);
  void group_pairs(const Tensor& x, const Tensor& expert_ids, const MoeWeights& moe);
  const uint16_t* const* gather_rows_bf16(int64_t first_pair, int64_t num_pairs, int64_t cols,
                                          Worker& worker) const;
  void run_gate_up(const MlpWeights& mlp, int64_t first_pair, int64_t num_pairs, int64_t row0, int64_t rows,
                   bool is_rounded, Worker& worker);

  const Kernels& kernels_;
  std::unique_ptr<CpuGqa> gqa_;                   // null where the model has MLA
  std::unique_ptr<CpuExpandedMla> expanded_mla_;  // null where attention is absorbed
  std::vector<void*> buffers_;                    // everything from alloc() below
  std::vector<Worker> workers_;                   // [num_threads]

  const float** x_rows_ = nullptr;  // [max rows] inputs of the op at hand
  // The same rounded to bf16; null on a path that takes no packed weights.
  const uint16_t** x_bf16_ = nullptr;  // [max rows]
  uint16_t* inputs_bf16_ = nullptr;    // [T, bf16_stride_]
  int64_t bf16_stride_ = 0;            // max inputs rounded up
  float** out_rows_ = nullptr;         // [max rows]
  float** out_rows1_ = nullptr;        // [max rows] second output of linear_pair

  int64_t chunk_tokens_ = 0;        // most tokens of one chunk of attention
  float* query_latents_ = nullptr;  // [chunk_tokens, A, latent_dim] absorbed queries
  float* value_latents_ = nullptr;  // [chunk_tokens, A, lora_rank] attention's sums of latents
  float* softmax_max_ = nullptr;    // [chunk_tokens, A]
  float* softmax_sum_ = nullptr;    // [chunk_tokens, A]
  int64_t max_parts_ = 0;           // most rows of one wave of split attention
  float* parts_ = nullptr;          // [max_parts, lora_rank]
  float* parts_max_ = nullptr;      // [max_parts]
  float* parts_sum_ = nullptr;      // [max_parts]

  int64_t down_strip_ = 0;  // outputs of one task of the experts' down pass
  // A pair is one (token, expert) of the routing; pairs are sorted by expert, the shared expert's come last.
  std::vector<int64_t> expert_start_;       // [E + 2] first pair of each expert; [E] is the shared one
  std::vector<int64_t> active_experts_;     // [<= E + 1] experts that have pairs
  std::vector<ExpertPiece> expert_pieces_;  // tasks of gate and up
  std::vector<int64_t> pair_of_slot_;       // [T * k] where slot j of token t went
  std::vector<int64_t> pair_token_;         // [T * (k + 1)]
  float* expert_hidden_ = nullptr;          // [T, k * Im + Is] intermediate of every pair
  uint16_t* hidden_bf16_ = nullptr;         // [T * (k + 1), hidden_stride_] the same in bf16
  int64_t hidden_stride_ = 0;               // max(Im, Is) rounded up
  const uint16_t** hidden_rows_ = nullptr;  // [T * (k + 1)] null on a path that takes no packed weights

  // What place() has repacked.
  struct PackedMla {
    std::vector<Weight> keys;    // [A] W_UK,h transposed: [lora_rank, nope_dim]
    std::vector<Weight> values;  // [A] W_UV,h: [v_dim, lora_rank]
    std::vector<float> scale;    // [A, blocks of lora_rank] of the keys
  };
  PageArena arena_;
  std::deque<PackedMla> packed_mla_;
};

}  // namespace rodin
