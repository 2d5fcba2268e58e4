// The operations a forward is made of, implemented once per device: ReferenceOps (float32, readable, the
// oracle), CpuOps (fast), CudaOps. One Ops belongs to one Runner and is used from its engine thread only.
//
// Contract of every op
// - Tensors are views of memory from alloc(); outputs never alias inputs unless a comment says so.
// - Activations have activation_dtype(), the residual stream and logits are float32. Sums are float32.
// - Batch invariance: what an op computes for a row depends on that row (and the cache rows that it attends
//   to) alone: not on T, on the row's place in the batch, or on how a prompt was cut into chunks. On a GPU
//   only with BackendOptions::is_deterministic.
// - Ops may run asynchronously; download(), sample() and finish_sample() return when their results are in
//   host memory.
// - Shapes are the caller's duty and checked cheaply; an op throws std::runtime_error with one sentence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "ops/tensor.h"
#include "ops/weight.h"

namespace rodin {

struct SampleArgs;
struct SampleResult;

// Upper bounds of everything a step can hold: sizes an Ops' own workspace, once.
struct OpsLimits {
  int64_t max_step_tokens = 0;
  int64_t max_num_seqs = 0;
  int64_t max_logit_rows = 0;  // most rows of one sample() or lm_head call
  int64_t num_blocks = 0;
  int64_t block_size = 0;
  int64_t max_context = 0;  // most positions of a sequence; 0: what the blocks hold
  int64_t hidden_size = 0;
  int64_t vocab_size = 0;
  int64_t max_linear_inputs = 0;  // largest Weight::cols
  int64_t intermediate_size = 0;  // dense layers
  int64_t num_experts = 0;        // 0: no MoE layer
  int64_t experts_per_token = 0;
  int64_t moe_intermediate_size = 0;     // one routed expert
  int64_t shared_intermediate_size = 0;  // the shared expert, 0 where there is none
  MlaShape mla;                          // all 0 in a model with GQA
  GqaShape gqa;                          // all 0 in a model with MLA
};

// Which tokens a step computes and where their latents lie. Pointers are host memory when the caller fills it
// in, device memory in what begin_step() returns (the same on a CPU).
//
// Row i belongs to sequence s where q_start[s] <= i < q_start[s+1], is rotated by rope_positions[i], stores
// its latent at slots[i], and attends to cache positions first_position .. cache_positions[i] of its
// sequence, both included; position p lies in block block_table[block_table_start[s] + p / block_size].
// Positions of a sequence's rows are consecutive and rising.
struct StepIndex {
  int64_t num_seqs = 0;    // S
  int64_t num_tokens = 0;  // T
  int64_t block_size = 0;
  int64_t first_position = 0;          // 0 in decoder layers; 1 in the MTP module, whose slot 0 holds nothing
  int64_t max_q_len = 0;               // most rows of one sequence
  int64_t max_context_len = 0;         // largest cache position + 1
  const int32_t* token_ids = nullptr;  // [T]
  const int32_t* rope_positions = nullptr;     // [T]
  const int32_t* cache_positions = nullptr;    // [T]
  const int32_t* slots = nullptr;              // [T] -1: the latent is already there, do not write
  const int32_t* q_start = nullptr;            // [S + 1]
  const int32_t* seq_of_token = nullptr;       // [T]
  const int32_t* block_table_start = nullptr;  // [S + 1]
  const int32_t* block_table = nullptr;        // [block_table_start[S]]
};

// angle(position, i) = position * inv_freq[i], rounded to float32; cos and sin are multiplied by
// `multiplier`.
struct RopeParams {
  const float* inv_freq = nullptr;  // [rope_dim / 2], device memory
  float multiplier = 1.0f;
};

// One layer of the latent cache: row = slot. MLA: [lora_rank normed latents | rope_dim rotated key], or what
// else a device keeps of a position in that room; GQA:
// [G * D rotated keys | G * D values]. kF8E4M3 (MLA alone): bytes, [lora_rank e4m3 | a float32 scale for each
// 128 of them | rope_dim bf16].
struct CacheLayer {
  Tensor latents;  // [num_blocks * block_size, latent_dim or row_dim], cache_dtype()
};

// Of a device that has memory of its own, in bytes; 0 elsewhere.
struct DeviceMemory {
  int64_t free = 0;
  int64_t total = 0;
};

// What a device can do at most, measured; 0: it does not measure that.
struct Ceilings {
  double read_bytes_per_second = 0;  // of memory that no cache holds
  double flops_per_second = 0;       // of the products that linear is made of; a multiply-add counts as two
};

// rms_norm of a residual that nobody has made yet.
struct PendingNorm {
  Tensor residual;  // float32 [T, H]
  const float* weight;
  float eps;
};

class Ops {
 public:
  virtual ~Ops() = default;

  // e.g. "cpu (avx512)"
  virtual std::string name() const = 0;
  virtual Dtype activation_dtype() const = 0;
  virtual Dtype cache_dtype() const = 0;
  // Takes about a second; for benchmarks.
  virtual Ceilings measure_ceilings() { return {}; }

  // ---- memory -------------------------------------------------------------------------------------------
  // Device memory, 64-byte aligned, contents undefined; throws when there is none. Freed by free().
  virtual void* alloc(size_t bytes) = 0;
  virtual void free(void* data) = 0;
  virtual void upload(void* device, const void* host, size_t bytes) = 0;
  virtual void download(void* host, const void* device, size_t bytes) = 0;
  virtual DeviceMemory memory() const { return {}; }

  // ---- weights: a host view becomes a view that the ops below accept ------------------------------------
  // The host memory outlives the Ops; a CPU keeps pointing at it. Called once each, before reserve().
  // Tied tensors are placed once and the result is copied by the caller.
  virtual void place(Weight& weight) = 0;
  // A table of embeddings that no product uses.
  virtual void place_table(Weight& table) { place(table); }
  virtual const float* place_vector(const float* host, int64_t size) = 0;  // [size]
  // The families may be repacked as a whole (`packed`); by default each tensor is placed on its own.
  virtual void place(MlpWeights& mlp) {
    place(mlp.gate);
    place(mlp.up);
    place(mlp.down);
  }
  virtual void place(MoeWeights& moe);
  virtual void place(MlaWeights& mla);
  virtual void place(GqaWeights& gqa);
  // Whether a placed weight is a copy, so that its host memory is never read again.
  virtual bool is_copied(const Weight&) const { return false; }
  // Allocates the Ops' own workspace and returns its bytes. Called once, after every place().
  virtual size_t reserve(const OpsLimits& limits) = 0;

  // ---- a step -------------------------------------------------------------------------------------------
  // Makes the index arrays available to the device. At most two indices live in one step (decoder layers,
  // MTP module); `which` is 0 or 1 and an index is valid until begin_step(which) is called again.
  virtual StepIndex begin_step(const StepIndex& host, int which) = 0;
  // Enqueues what `body` enqueues with this index; what body does is the same in every call for indices of
  // one `which`, and it reads no host memory but the index's sizes. A device may record it and replay the
  // recording for later indices of the same shape without calling it.
  virtual void run_recorded([[maybe_unused]] const StepIndex& index, const std::function<void()>& body) {
    body();
  }
  // table[i] = [cos of rope_dim/2 angles | sin of them], float32 [T, rope_dim], at rope_positions.
  virtual void rope_table(const StepIndex& index, const RopeParams& params, const Tensor& table) = 0;

  // out[i] = table[token_ids[i]] in float32; table [V, H] of any float dtype, out [T, H] float32.
  virtual void embed(const Weight& table, const StepIndex& index, const Tensor& out) = 0;
  // out = x * rsqrt(mean(x^2) + eps) * weight. x [T, N] float32 or activation dtype, weight [N] float32,
  // out [T, N] activation dtype; out may be x. Either may have a stride (a column slice).
  virtual void rms_norm(const Tensor& x, const float* weight, float eps, const Tensor& out) = 0;
  // residual += delta; out = rms_norm(residual). residual [T, H] float32, delta [T, H], out [T, H].
  virtual void add_rms_norm(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                            const Tensor& out) = 0;
  // out = x W^T + bias. x [T, K], out [T, N] activation dtype, or float32 (logits).
  virtual void linear(const Tensor& x, const Weight& weight, const Tensor& out) = 0;
  // Two linears of one input in one call: out0 = x W0^T + b0, out1 = x W1^T + b1.
  virtual void linear_pair(const Tensor& x, const Weight& weight0, const Tensor& out0, const Weight& weight1,
                           const Tensor& out1) = 0;
  // out = silu(x G^T) * (x U^T). x [T, H], out [T, I].
  virtual void gate_up_silu(const Tensor& x, const MlpWeights& mlp, const Tensor& out) = 0;
  // to[i] = from[rows[i]]; rows is host memory [to.rows]; same dtype and columns.
  virtual void gather_rows(const Tensor& from, const int32_t* rows, const Tensor& to) = 0;

  // ---- MLA ----------------------------------------------------------------------------------------------
  // Rotates the rope part of every head of q [T, A * qk_dim] in place. kv [T, lora_rank + rope_dim] is
  // c = rms_norm(kv[:lora_rank], kv_a_norm, eps) and the rotated key kv[lora_rank:]; both go to the cache row
  // slots[i], rounded to cache_dtype(), unless the slot is -1. kv may be overwritten.
  virtual void mla_rope_store(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                              const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache) = 0;
  // What mla_rope_store does with kv, for rows that nobody asks anything; devices that gain by it override
  // both.
  virtual bool has_mla_store() const { return false; }
  virtual void mla_store(const Tensor& kv, const MlaWeights& mla, float eps, const Tensor& rope_table,
                         const StepIndex& index, const CacheLayer& cache);
  // out [T, A * v_dim] from q [T, A * qk_dim] (rotated) and the cache, this step's rows included:
  //   k_h(p) = [W_UK,h c(p) | k_rope(p)], v_h(p) = W_UV,h c(p),
  //   out_h = sum_p softmax_p(softmax_scale * q_h . k_h(p)) v_h(p).
  // Naive form: k and v expanded; absorbed form: q_h W_UK,h meets c(p), W_UV,h is applied to sum_p P c(p).
  virtual void mla_attention(const Tensor& q, const MlaWeights& mla, const StepIndex& index,
                             const CacheLayer& cache, const Tensor& out) = 0;

  // Both in one call: a device may join their parts.
  virtual void mla_store_and_attend(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                                    const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache,
                                    const Tensor& out) {
    mla_rope_store(q, kv, mla, eps, rope_table, index, cache);
    mla_attention(q, mla, index, cache, out);
  }

  // linear_pair of q_b and kv_a, mla_store_and_attend and o's linear layer in fewer launches, with the bits
  // of those: x [T, H] -> out [T, H]. norm, or null: x is not there yet, and is that norm; it need not be
  // written. False, and nothing is done, where this device has none for this layer and step.
  virtual bool mla_joined([[maybe_unused]] const Tensor& x, [[maybe_unused]] const PendingNorm* norm,
                          [[maybe_unused]] const MlaWeights& mla, [[maybe_unused]] float eps,
                          [[maybe_unused]] const Tensor& rope_table, [[maybe_unused]] const StepIndex& index,
                          [[maybe_unused]] const CacheLayer& cache, [[maybe_unused]] const Tensor& q,
                          [[maybe_unused]] const Tensor& kv, [[maybe_unused]] const Tensor& attention,
                          [[maybe_unused]] const Tensor& out) {
    return false;
  }

  // ---- GQA: devices that have it override all three -----------------------------------------------------
  virtual bool has_gqa() const { return false; }
  // Rotates every head of q [T, A * D] and of the keys kv[:, :G * D] in place. The row kv [T, 2 * G * D],
  // keys then values, goes to the cache row slots[i], rounded to cache_dtype(), unless the slot is -1.
  virtual void gqa_rope_store(const Tensor& q, const Tensor& kv, const GqaShape& shape,
                              const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache);
  // out [T, A * D] from q [T, A * D] (rotated) and the cache, this step's rows included; k_g and v_g are
  // those of kv head g = h / group_size in the row of position p:
  //   out_h = sum_p softmax_p(softmax_scale * q_h . k_g(p)) v_g(p).
  virtual void gqa_attention(const Tensor& q, const GqaShape& shape, const StepIndex& index,
                             const CacheLayer& cache, const Tensor& out);

  // ---- MoE ----------------------------------------------------------------------------------------------
  // Scores are float32 whatever the activations are. choice = scores (+ correction_bias for noaux_tc).
  // Unless greedy or num_groups = 1, only the topk_groups best groups stay: by the sum of the two largest
  // choices (noaux_tc) or by the largest (group_limited_greedy). Then the k largest choices, in falling
  // order; every tie goes to the lower index. weight = score (without the bias), divided by the sum over the
  // k
  // (+ 1e-20) if norm_topk_prob and k > 1, times routed_scaling_factor.
  // x [T, H]; expert_ids int32 [T, k]; expert_weights float32 [T, k].
  virtual void route(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
                     const Tensor& expert_weights) = 0;
  // out[t] = sum over slots j, in order, of expert_weights[t, j] * expert_(expert_ids[t, j])(x[t]), then
  // + shared(x[t]) where there is one. x, out [T, H].
  virtual void moe(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
                   const Tensor& expert_weights, const Tensor& out) = 0;
  // add_rms_norm, then route of its result `out`, in one call: a device may join their parts. The next
  // likewise: moe into `delta`, which holds nothing of use afterwards, then add_rms_norm; out may be x.
  virtual void add_rms_norm_route(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                                  const Tensor& out, const MoeWeights& moe, const Tensor& expert_ids,
                                  const Tensor& expert_weights) {
    add_rms_norm(residual, delta, weight, eps, out);
    route(out, moe, expert_ids, expert_weights);
  }
  virtual void moe_add_rms_norm(const Tensor& x, const MoeWeights& weights, const Tensor& expert_ids,
                                const Tensor& expert_weights, const Tensor& delta, const Tensor& residual,
                                const float* weight, float eps, const Tensor& out) {
    moe(x, weights, expert_ids, expert_weights, delta);
    add_rms_norm(residual, delta, weight, eps, out);
  }

  // Both of them, of one norm weight and the next: residual [T, H], delta and out [T, H], expert_ids and
  // expert_weights [T, k], of which only residual and out hold anything of use afterwards. next_weight null:
  // out is left to whoever reads it. False, and nothing is done, where this device has no fewer launches for
  // this layer and so many tokens.
  virtual bool moe_joined([[maybe_unused]] const Tensor& residual, [[maybe_unused]] const Tensor& delta,
                          [[maybe_unused]] const float* weight, [[maybe_unused]] float eps,
                          [[maybe_unused]] const MoeWeights& moe, [[maybe_unused]] const float* next_weight,
                          [[maybe_unused]] const Tensor& expert_ids,
                          [[maybe_unused]] const Tensor& expert_weights, [[maybe_unused]] const Tensor& out) {
    return false;
  }

  // ---- sampling -----------------------------------------------------------------------------------------
  // See ops/sample_args.h. logits [R, V] float32 on the device; the result is in host memory on return.
  virtual void sample(const SampleArgs& args) = 0;

  // ---- running ahead: the next step is enqueued before this one's results have come
  // ------------------------- Enqueues what sample() does and reads nothing of `args` afterwards; false where
  // the device cannot, or not with these rows. Then begin_step(.., 0) takes token ids below 0 until the next
  // call: -1 - r is the token that row r is sampled. The result of slot 0 or 1 is fetched by finish_sample()
  // before the slot's next use.
  virtual bool begin_sample([[maybe_unused]] const SampleArgs& args, [[maybe_unused]] int slot) {
    return false;
  }
  // Whether finish_sample() would not wait.
  virtual bool is_sampled([[maybe_unused]] int slot) { return true; }
  virtual void finish_sample([[maybe_unused]] int slot, [[maybe_unused]] SampleResult& result) {}

  // Marks 0 .. kNumMarks - 1: moments of the device's clock, between what is enqueued before and after the
  // call. micros_between() waits for the later one; 0 where the device has no clock of its own.
  static constexpr int kNumMarks = 8;
  virtual void mark([[maybe_unused]] int mark) {}
  virtual double micros_between([[maybe_unused]] int first, [[maybe_unused]] int last) { return 0; }
};

}  // namespace rodin
