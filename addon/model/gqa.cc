#include "model/gqa.h"

namespace rodin {

void run_gqa(Ops& ops, const GqaWeights& gqa, const Tensor& x, const StepIndex& index,
             const CacheLayer& cache, const GqaBuffers& at, const Tensor& out) {
  const int64_t kv_dim = gqa.shape.kv_dim();
  ops.linear(x, gqa.q, at.q);
  ops.linear_pair(x, gqa.k, at.kv.slice_cols(0, kv_dim), gqa.v, at.kv.slice_cols(kv_dim, kv_dim));
  ops.gqa_rope_store(at.q, at.kv, gqa.shape, at.angles, index, cache);
  ops.gqa_attention(at.q, gqa.shape, index, cache, at.attention);
  ops.linear(at.attention, gqa.o, out);
}

}  // namespace rodin
