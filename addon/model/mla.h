// Multi-head latent attention of one layer.
#pragma once

#include "ops/ops.h"

namespace rodin {

struct MlaBuffers {
  Tensor q_a;        // [T, q_lora_rank]
  Tensor q;          // [T, A * qk_dim]
  Tensor kv;         // [T, latent_dim]
  Tensor attention;  // [T, A * v_dim]
  Tensor angles;     // [T, rope_dim] filled by rope_table
};

// out [T, H] from the normed hidden states x [T, H]; writes this step's latents to the cache. norm, or null:
// x is working memory, and that norm is made first.
void run_mla(Ops& ops, const MlaWeights& mla, const Tensor& x, const PendingNorm* norm,
             const StepIndex& index, const CacheLayer& cache, const MlaBuffers& at, const Tensor& out);

// The same where the latents of x lie in the cache already and every slot is -1; what `at.kv` holds is of no
// use.
void run_stored_mla(Ops& ops, const MlaWeights& mla, const Tensor& x, const StepIndex& index,
                    const CacheLayer& cache, const MlaBuffers& at, const Tensor& out);

// Only writes the latents of x to the cache, through kv [T, latent_dim]; angles [T, rope_dim]. Where
// ops.has_mla_store().
void store_latents(Ops& ops, const MlaWeights& mla, const Tensor& x, const StepIndex& index,
                   const CacheLayer& cache, const Tensor& kv, const Tensor& angles);

}  // namespace rodin
