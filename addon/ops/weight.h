// Weights as the checkpoint stores them: non-owning views, row-major [output, input].
#pragma once

#include <cstdint>
#include <vector>

#include "ops/tensor.h"

namespace rodin {

// y = x W^T + bias. The data may be unaligned (it lies in a memory-mapped shard) until an Ops places it.
struct Weight {
  const void* data = nullptr;  // [rows, cols], dense
  Dtype dtype = Dtype::kF32;
  int64_t rows = 0;              // outputs
  int64_t cols = 0;              // inputs
  const float* scale = nullptr;  // [ceil(rows / block_rows), ceil(cols / block_cols)]; FP8 only, aligned
  int64_t block_rows = 0;
  int64_t block_cols = 0;
  const float* bias = nullptr;   // [rows] or null
  const void* packed = nullptr;  // belongs to the Ops that placed it

  bool present() const { return data != nullptr; }
  int64_t scale_cols() const { return scale ? (cols + block_cols - 1) / block_cols : 0; }
};

// down(silu(gate(x)) * up(x))
struct MlpWeights {
  Weight gate;  // [I, H]
  Weight up;    // [I, H]
  Weight down;  // [H, I]
};

enum class ScoringFunc : uint8_t { kSigmoid, kSoftmax };
enum class TopkMethod : uint8_t { kNoauxTc, kGreedy, kGroupLimitedGreedy };

// How experts are chosen. scores = scoring_func(router(x)); choice = scores (+ correction bias for noaux_tc).
struct RouteParams {
  int64_t num_experts = 0;        // E
  int64_t experts_per_token = 0;  // k
  int64_t num_groups = 1;
  int64_t topk_groups = 1;
  ScoringFunc scoring_func = ScoringFunc::kSigmoid;
  TopkMethod topk_method = TopkMethod::kNoauxTc;
  bool norm_topk_prob = false;
  float routed_scaling_factor = 1.0f;
};

struct MoeWeights {
  Weight router;                           // [E, H]
  const float* correction_bias = nullptr;  // [E]; noaux_tc only
  std::vector<MlpWeights> experts;         // [E] gate, up [Im, H], down [H, Im]
  MlpWeights shared;                       // gate, up [Im * num_shared, H]; absent where there is none
  RouteParams route;
  const void* packed = nullptr;  // belongs to the Ops that placed it

  bool has_shared() const { return shared.gate.present(); }
};

struct MlaShape {
  int64_t num_heads = 0;  // A
  int64_t nope_dim = 0;   // qk_nope_head_dim
  int64_t rope_dim = 0;   // qk_rope_head_dim, even
  int64_t v_dim = 0;      // v_head_dim
  int64_t lora_rank = 0;  // kv_lora_rank
  float softmax_scale = 0;
  bool rope_interleave = true;  // pairs (0,1),(2,3),.. rotate; false: pairs (i, i + rope_dim/2)

  int64_t qk_dim() const { return nope_dim + rope_dim; }
  int64_t latent_dim() const { return lora_rank + rope_dim; }  // what one position takes in the latent cache
};

struct MlaWeights {
  Weight q_a;                        // [q_lora_rank, H]; absent: q_b takes the hidden state itself
  const float* q_a_norm = nullptr;   // [q_lora_rank]
  Weight q_b;                        // [A * qk_dim, q_lora_rank], or q_proj [A * qk_dim, H]
  Weight kv_a;                       // [lora_rank + rope_dim, H]
  const float* kv_a_norm = nullptr;  // [lora_rank]
  Weight kv_b;  // [A * (nope_dim + v_dim), lora_rank]; head h: nope_dim rows of W_UK, then v_dim rows of W_UV
  Weight o;     // [H, A * v_dim]
  MlaShape shape;
  const void* packed = nullptr;  // belongs to the Ops that placed it
};

// Grouped-query attention: group_size() query heads share the key and the value of one kv head.
struct GqaShape {
  int64_t num_heads = 0;     // A; 0: the model has MLA instead
  int64_t num_kv_heads = 0;  // G, a divisor of A
  int64_t head_dim = 0;      // D, even; pairs (i, i + D/2) rotate
  float softmax_scale = 0;

  int64_t group_size() const { return num_heads / num_kv_heads; }
  int64_t kv_dim() const { return num_kv_heads * head_dim; }  // the keys (or values) of one position
  int64_t row_dim() const { return 2 * kv_dim(); }            // what one position takes in the cache
};

struct GqaWeights {
  Weight q;  // [A * D, H]
  Weight k;  // [G * D, H]
  Weight v;  // [G * D, H]
  Weight o;  // [H, A * D]
  GqaShape shape;
  const void* packed = nullptr;  // belongs to the Ops that placed it
};

}  // namespace rodin
