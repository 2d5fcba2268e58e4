// Every tensor of the model under the name the forward uses for it.
#pragma once

#include <optional>
#include <vector>

#include "model/spec.h"
#include "model/tensor_table.h"
#include "ops/weight.h"

namespace rodin {

class Ops;

struct LayerWeights {
  const float* input_norm = nullptr;  // [H]
  bool is_gqa = false;
  MlaWeights mla;                              // deepseek_*
  GqaWeights gqa;                              // llama, qwen2
  const float* post_attention_norm = nullptr;  // [H]
  bool is_moe = false;
  MlpWeights mlp;  // dense layer
  MoeWeights moe;  // MoE layer
};

// Multi-token prediction: predicts token i + 2 from token i + 1 (embedded like any other) and the hidden
// state at i.
struct MtpWeights {
  const float* enorm = nullptr;  // [H]
  const float* hnorm = nullptr;  // [H]
  Weight eh_proj;                // [H, 2 H]
  LayerWeights layer;
  const float* head_norm = nullptr;  // [H]
  Weight head;                       // [V, H]
};

struct ModelWeights {
  Weight embed;  // [V, H]
  std::vector<LayerWeights> layers;
  const float* final_norm = nullptr;  // [H]
  Weight lm_head;                     // [V, H]
  std::optional<MtpWeights> mtp;
};

// Views into the table. Throws where a tensor is missing or has another shape than the spec asks for.
ModelWeights find_weights(const ModelSpec& spec, TensorTable& table, bool load_mtp);

// Places every tensor on the device of `ops`, each once, and gives the memory of those that were copied back
// to the system where `table` is given: the tensors then lie in it.
void place_weights(ModelWeights& weights, Ops& ops, const ModelSpec& spec,
                   const TensorTable* table = nullptr);

// The entries that find_weights() will use; others (unused MTP modules, ...) are neither mapped nor counted.
std::vector<TensorEntry> needed_entries(const ModelSpec& spec, const std::vector<TensorEntry>& entries,
                                        bool load_mtp);

// All 0 in a model with the other kind of attention.
MlaShape mla_shape(const ModelSpec& spec);
RouteParams route_params(const ModelSpec& spec);
GqaShape gqa_shape(const ModelSpec& spec);

// Elements of `dtype` that one position takes in one layer of the latent cache (ops.h, CacheLayer).
int64_t cache_row_dim(const ModelSpec& spec, Dtype dtype);

}  // namespace rodin
