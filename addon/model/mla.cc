#include "model/mla.h"

namespace rodin {
namespace {

// Of q_a_layernorm and kv_a_layernorm; not config.json's rms_norm_eps.
constexpr float kLatentNormEps = 1e-6f;

// From q_a's product, or where there is none q_b's, to `out`.
void finish_mla(Ops& ops, const MlaWeights& mla, const StepIndex& index, const CacheLayer& cache,
                const MlaBuffers& at, const Tensor& out) {
  if (mla.q_a.present()) {
    ops.rms_norm(at.q_a, mla.q_a_norm, kLatentNormEps, at.q_a);
    ops.linear(at.q_a, mla.q_b, at.q);
  }
  ops.mla_store_and_attend(at.q, at.kv, mla, kLatentNormEps, at.angles, index, cache, at.attention);
  ops.linear(at.attention, mla.o, out);
}

}  // namespace

void run_mla(Ops& ops, const MlaWeights& mla, const Tensor& x, const PendingNorm* norm,
             const StepIndex& index, const CacheLayer& cache, const MlaBuffers& at, const Tensor& out) {
  const bool has_q_a = mla.q_a.present();
  if (!has_q_a &&
      ops.mla_joined(x, norm, mla, kLatentNormEps, at.angles, index, cache, at.q, at.kv, at.attention, out))
    return;
  if (norm != nullptr) ops.rms_norm(norm->residual, norm->weight, norm->eps, x);
  if (has_q_a) {
    ops.linear_pair(x, mla.q_a, at.q_a, mla.kv_a, at.kv);
  } else {
    ops.linear_pair(x, mla.q_b, at.q, mla.kv_a, at.kv);
  }
  finish_mla(ops, mla, index, cache, at, out);
}

void run_stored_mla(Ops& ops, const MlaWeights& mla, const Tensor& x, const StepIndex& index,
                    const CacheLayer& cache, const MlaBuffers& at, const Tensor& out) {
  if (mla.q_a.present()) {
    ops.linear(x, mla.q_a, at.q_a);
  } else {
    ops.linear(x, mla.q_b, at.q);
  }
  finish_mla(ops, mla, index, cache, at, out);
}

void store_latents(Ops& ops, const MlaWeights& mla, const Tensor& x, const StepIndex& index,
                   const CacheLayer& cache, const Tensor& kv, const Tensor& angles) {
  ops.linear(x, mla.kv_a, kv);
  ops.mla_store(kv, mla, kLatentNormEps, angles, index, cache);
}

}  // namespace rodin
