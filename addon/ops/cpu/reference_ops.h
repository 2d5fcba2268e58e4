// ReferenceOps: every op as plain float32 loops, products summed in double. The readable definition and the
// oracle of all others (compute = 'float32'). Latents are cached in float32; attention is the naive form.
#pragma once

#include <vector>

#include "ops/cpu/host_ops.h"

namespace rodin {

class ReferenceOps : public HostOps {
 public:
  explicit ReferenceOps(int num_threads) : HostOps(num_threads) {}

  std::string name() const override { return "cpu (float32 reference)"; }
  Dtype cache_dtype() const override { return Dtype::kF32; }

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
  // out rows of one head of one sequence, for all its queries; see mla_attention.
  void attend_head(int64_t seq, int64_t head, const Tensor& q, const MlaWeights& mla, const StepIndex& index,
                   const CacheLayer& cache, const Tensor& out);
};

// Row `row` of a weight in float32, block scales applied.
void dequantise_row(const Weight& weight, int64_t row, float* out);  // [cols]

// Sum of a[i] * b[i] in double, rounded once.
float dot_product(const float* a, const float* b, int64_t n);

float silu(float x);

}  // namespace rodin
