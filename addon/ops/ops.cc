#include "ops/ops.h"

#include "ops/check.h"

namespace rodin {

void Ops::place(MoeWeights& moe) {
  place(moe.router);
  if (moe.correction_bias) moe.correction_bias = place_vector(moe.correction_bias, moe.route.num_experts);
  for (MlpWeights& expert : moe.experts) place(expert);
  if (moe.has_shared()) place(moe.shared);
}

void Ops::place(MlaWeights& mla) {
  if (mla.q_a.present()) {
    place(mla.q_a);
    mla.q_a_norm = place_vector(mla.q_a_norm, mla.q_a.rows);
  }
  place(mla.q_b);
  place(mla.kv_a);
  mla.kv_a_norm = place_vector(mla.kv_a_norm, mla.shape.lora_rank);
  place(mla.kv_b);
  place(mla.o);
}

void Ops::place(GqaWeights& gqa) {
  place(gqa.q);
  place(gqa.k);
  place(gqa.v);
  place(gqa.o);
}

void Ops::mla_store(const Tensor&, const MlaWeights&, float, const Tensor&, const StepIndex&,
                    const CacheLayer&) {
  fail("storing latents without queries is not supported on ", name());
}

void Ops::gqa_rope_store(const Tensor&, const Tensor&, const GqaShape&, const Tensor&, const StepIndex&,
                         const CacheLayer&) {
  fail("grouped-query attention is not supported on ", name(), "; use the device cpu");
}

void Ops::gqa_attention(const Tensor&, const GqaShape&, const StepIndex&, const CacheLayer&, const Tensor&) {
  fail("grouped-query attention is not supported on ", name(), "; use the device cpu");
}

}  // namespace rodin
