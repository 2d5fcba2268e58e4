#include "ops/ops.h"

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

}  // namespace rodin
