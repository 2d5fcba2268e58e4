// THE forward: what a step computes, over any Ops. Holds the intermediate tensors and nothing of a request.
#pragma once

#include <vector>

#include "model/spec.h"
#include "model/weights.h"
#include "model/workspace.h"
#include "ops/ops.h"

namespace rodin {

// The intermediate tensors; rows are the most that a step can need, a step uses a slice.
struct ForwardBuffers {
  Tensor residual;        // [T, H] float32
  Tensor normed;          // [T, H] input of attention or MLP
  Tensor delta;           // [T, H] output of attention or MLP, not yet added to residual
  Tensor hidden;          // [T, H] after the final norm
  Tensor angles;          // [T, rope_dim] float32
  Tensor q_a;             // [T, q_lora_rank]
  Tensor q;               // [T, A * qk_dim]; GQA: [T, A * D]
  Tensor kv;              // [T, latent_dim]; GQA: [T, 2 * G * D]
  Tensor attention;       // [T, A * v_dim]; GQA: [T, A * D]
  Tensor mlp;             // [T, I] dense layers
  Tensor expert_ids;      // [T, k] int32
  Tensor expert_weights;  // [T, k] float32
  Tensor mtp_input;       // [T, 2 H] MTP module
  Tensor logits_input;    // [max_logit_rows, H]
  Tensor logits;          // [max_logit_rows, V] float32

  // The first num_tokens rows of everything that has a row per token.
  ForwardBuffers first_rows(int64_t num_tokens) const;
};

class Forward {
 public:
  // `weights` are placed on the device of `ops`; both outlive this.
  Forward(const ModelSpec& spec, const ModelWeights& weights, Ops& ops, int64_t max_step_tokens,
          int64_t max_logit_rows);
  ~Forward();
  Forward(const Forward&) = delete;
  Forward& operator=(const Forward&) = delete;

  size_t workspace_bytes() const { return workspace_.bytes(); }
  int64_t max_logit_rows() const { return buffers_.logits.rows; }

  // Runs the decoder layers; returns the hidden states after the final norm [T, H], valid until the next
  // call.
  Tensor run(const StepIndex& index, const std::vector<CacheLayer>& cache);

  // Runs the MTP module: row i is made from token index.token_ids[i] and row hidden_rows[i] of `hidden`, that
  // of the token before it. Returns its hidden states after shared_head.norm [T', H], valid until the next
  // call.
  Tensor run_mtp(const StepIndex& index, const Tensor& hidden, const int32_t* hidden_rows,
                 const CacheLayer& cache);

  // The cache entries that run_mtp() makes of these rows, and nothing else of it: for rows whose hidden
  // states nobody reads. Only where can_store_mtp().
  void store_mtp(const StepIndex& index, const Tensor& hidden, const int32_t* hidden_rows,
                 const CacheLayer& cache);
  bool can_store_mtp() const;
  // What run_mtp() returns for some rows, in rising order, of the last store_mtp(), of which `index` is a
  // part whose slots are -1: what all rows need was computed for all at once.
  Tensor run_stored_mtp(const StepIndex& index, const int32_t* stored_rows, const CacheLayer& cache);

  // Logits of some rows of what run() or run_mtp() returned: float32 [num_rows, V], valid until the next
  // call. num_rows is at most max_logit_rows().
  Tensor logits(const Tensor& hidden, const int32_t* rows, int64_t num_rows);
  Tensor mtp_logits(const Tensor& hidden, const int32_t* rows, int64_t num_rows);

 private:
  void run_layers(const StepIndex& index, const std::vector<CacheLayer>& cache, const ForwardBuffers& at);
  // From at.normed, or where that is not made yet from at.residual, to at.delta.
  void attention(const LayerWeights& layer, bool is_normed, const StepIndex& index, const CacheLayer& cache,
                 const ForwardBuffers& at);
  // From at.delta of attention to `out`, normed with next_norm; false where the norm was left, as it may be.
  bool mlp(const LayerWeights& layer, const float* next_norm, bool may_leave_norm, const ForwardBuffers& at,
           const Tensor& out);
  void join_mtp_input(const StepIndex& index, const ForwardBuffers& at);
  Tensor head(const Weight& weight, const Tensor& hidden, const int32_t* rows, int64_t num_rows);

  const ModelSpec& spec_;
  const ModelWeights& weights_;
  Ops& ops_;
  Workspace workspace_;
  ForwardBuffers buffers_;
  RopeParams rope_;
  float eps_;
};

}  // namespace rodin
