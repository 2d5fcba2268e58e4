#include "model/weights.h"

#include "model/rope.h"
#include "ops/check.h"
#include "ops/ops.h"

namespace rodin {
namespace {

std::string layer_prefix(int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

MlpWeights find_mlp(TensorTable& table, const std::string& prefix, int64_t hidden, int64_t intermediate,
                    bool has_bias = false) {
  MlpWeights mlp;
  mlp.gate = table.matrix(prefix + "gate_proj.weight", intermediate, hidden);
  mlp.up = table.matrix(prefix + "up_proj.weight", intermediate, hidden);
  mlp.down = table.matrix(prefix + "down_proj.weight", hidden, intermediate);
  if (!has_bias) return mlp;
  mlp.gate.bias = table.vector(prefix + "gate_proj.bias", intermediate);
  mlp.up.bias = table.vector(prefix + "up_proj.bias", intermediate);
  mlp.down.bias = table.vector(prefix + "down_proj.bias", hidden);
  return mlp;
}

MoeWeights find_moe(const ModelSpec& spec, TensorTable& table, const std::string& prefix) {
  MoeWeights moe;
  moe.route = route_params(spec);
  moe.router = table.matrix(prefix + "gate.weight", spec.num_routed_experts, spec.hidden_size);
  if (moe.route.topk_method == TopkMethod::kNoauxTc) {
    moe.correction_bias = table.vector(prefix + "gate.e_score_correction_bias", spec.num_routed_experts);
  }
  for (int64_t e = 0; e < spec.num_routed_experts; ++e) {
    moe.experts.push_back(find_mlp(table, prefix + "experts." + std::to_string(e) + ".", spec.hidden_size,
                                   spec.moe_intermediate_size));
  }
  if (spec.num_shared_experts > 0) {
    moe.shared = find_mlp(table, prefix + "shared_experts.", spec.hidden_size,
                          spec.moe_intermediate_size * spec.num_shared_experts);
  }
  return moe;
}

MlaWeights find_mla(const ModelSpec& spec, TensorTable& table, const std::string& prefix) {
  MlaWeights mla;
  mla.shape = mla_shape(spec);
  const int64_t hidden = spec.hidden_size;
  const int64_t q_rows = spec.num_attention_heads * mla.shape.qk_dim();
  if (spec.q_lora_rank > 0) {
    mla.q_a = table.matrix(prefix + "q_a_proj.weight", spec.q_lora_rank, hidden);
    mla.q_a_norm = table.vector(prefix + "q_a_layernorm.weight", spec.q_lora_rank);
    mla.q_b = table.matrix(prefix + "q_b_proj.weight", q_rows, spec.q_lora_rank);
  } else {
    mla.q_b = table.matrix(prefix + "q_proj.weight", q_rows, hidden);
  }
  mla.kv_a = table.matrix(prefix + "kv_a_proj_with_mqa.weight", mla.shape.latent_dim(), hidden);
  mla.kv_a_norm = table.vector(prefix + "kv_a_layernorm.weight", spec.kv_lora_rank);
  mla.kv_b =
      table.matrix(prefix + "kv_b_proj.weight",
                   spec.num_attention_heads * (spec.qk_nope_head_dim + spec.v_head_dim), spec.kv_lora_rank);
  mla.o = table.matrix(prefix + "o_proj.weight", hidden, spec.num_attention_heads * spec.v_head_dim);
  if (spec.attention_bias) {
    if (spec.q_lora_rank > 0) mla.q_a.bias = table.vector(prefix + "q_a_proj.bias", spec.q_lora_rank);
    mla.kv_a.bias = table.vector(prefix + "kv_a_proj_with_mqa.bias", mla.shape.latent_dim());
    mla.o.bias = table.vector(prefix + "o_proj.bias", hidden);
  }
  return mla;
}

GqaWeights find_gqa(const ModelSpec& spec, TensorTable& table, const std::string& prefix) {
  GqaWeights gqa;
  gqa.shape = gqa_shape(spec);
  const int64_t hidden = spec.hidden_size;
  const int64_t q_rows = gqa.shape.num_heads * gqa.shape.head_dim;
  gqa.q = table.matrix(prefix + "q_proj.weight", q_rows, hidden);
  gqa.k = table.matrix(prefix + "k_proj.weight", gqa.shape.kv_dim(), hidden);
  gqa.v = table.matrix(prefix + "v_proj.weight", gqa.shape.kv_dim(), hidden);
  gqa.o = table.matrix(prefix + "o_proj.weight", hidden, q_rows);
  if (!spec.attention_bias) return gqa;
  gqa.q.bias = table.vector(prefix + "q_proj.bias", q_rows);
  gqa.k.bias = table.vector(prefix + "k_proj.bias", gqa.shape.kv_dim());
  gqa.v.bias = table.vector(prefix + "v_proj.bias", gqa.shape.kv_dim());
  if (spec.model_type == "llama") gqa.o.bias = table.vector(prefix + "o_proj.bias", hidden);
  return gqa;
}

LayerWeights find_layer(const ModelSpec& spec, TensorTable& table, int64_t index) {
  const std::string prefix = layer_prefix(index);
  LayerWeights layer;
  layer.input_norm = table.vector(prefix + "input_layernorm.weight", spec.hidden_size);
  layer.is_gqa = spec.is_gqa();
  if (layer.is_gqa) {
    layer.gqa = find_gqa(spec, table, prefix + "self_attn.");
  } else {
    layer.mla = find_mla(spec, table, prefix + "self_attn.");
  }
  layer.post_attention_norm = table.vector(prefix + "post_attention_layernorm.weight", spec.hidden_size);
  layer.is_moe = spec.is_moe_layer(index);
  if (layer.is_moe) {
    layer.moe = find_moe(spec, table, prefix + "mlp.");
  } else {
    layer.mlp = find_mlp(table, prefix + "mlp.", spec.hidden_size, spec.intermediate_size, spec.mlp_bias);
  }
  return layer;
}

std::vector<Weight*> matrices_of(LayerWeights& layer) {
  std::vector<Weight*> all;
  const auto add = [&](MlpWeights& mlp) { all.insert(all.end(), {&mlp.gate, &mlp.up, &mlp.down}); };
  if (layer.is_gqa) {
    all.insert(all.end(), {&layer.gqa.q, &layer.gqa.k, &layer.gqa.v, &layer.gqa.o});
  } else {
    all.insert(all.end(), {&layer.mla.q_a, &layer.mla.q_b, &layer.mla.kv_a, &layer.mla.kv_b, &layer.mla.o});
  }
  if (layer.is_moe) {
    for (MlpWeights& expert : layer.moe.experts) add(expert);
    add(layer.moe.shared);
  } else {
    add(layer.mlp);
  }
  return all;
}

// Calls place(), then releases those of the matrices that were copied.
template <class F>
void place_and_release(const std::vector<Weight*>& matrices, const Ops& ops, const TensorTable* table,
                       const F& place) {
  if (table == nullptr) return place();
  std::vector<Weight> on_host;
  for (const Weight* matrix : matrices) on_host.push_back(*matrix);
  place();
  for (size_t i = 0; i < matrices.size(); ++i) {
    if (matrices[i]->present() && ops.is_copied(*matrices[i])) table->release(on_host[i]);
  }
}

void place_layer(LayerWeights& layer, Ops& ops, int64_t hidden, const TensorTable* table) {
  place_and_release(matrices_of(layer), ops, table, [&] {
    layer.input_norm = ops.place_vector(layer.input_norm, hidden);
    if (layer.is_gqa) {
      ops.place(layer.gqa);
    } else {
      ops.place(layer.mla);
    }
    layer.post_attention_norm = ops.place_vector(layer.post_attention_norm, hidden);
    if (layer.is_moe) {
      ops.place(layer.moe);
    } else {
      ops.place(layer.mlp);
    }
  });
}

}  // namespace

RouteParams route_params(const ModelSpec& spec) {
  RouteParams route;
  route.num_experts = spec.num_routed_experts;
  route.experts_per_token = spec.num_experts_per_token;
  route.num_groups = spec.num_expert_groups;
  route.topk_groups = spec.topk_groups;
  route.scoring_func = spec.scoring_func == "softmax" ? ScoringFunc::kSoftmax : ScoringFunc::kSigmoid;
  route.topk_method = spec.topk_method == "noaux_tc" ? TopkMethod::kNoauxTc
                      : spec.topk_method == "greedy" ? TopkMethod::kGreedy
                                                     : TopkMethod::kGroupLimitedGreedy;
  route.norm_topk_prob = spec.norm_topk_prob;
  route.routed_scaling_factor = static_cast<float>(spec.routed_scaling_factor);
  return route;
}

MlaShape mla_shape(const ModelSpec& spec) {
  MlaShape shape;
  if (spec.is_gqa()) return shape;
  shape.num_heads = spec.num_attention_heads;
  shape.nope_dim = spec.qk_nope_head_dim;
  shape.rope_dim = spec.qk_rope_head_dim;
  shape.v_dim = spec.v_head_dim;
  shape.lora_rank = spec.kv_lora_rank;
  shape.softmax_scale = softmax_scale(spec);
  shape.rope_interleave = spec.rope_interleave;
  return shape;
}

GqaShape gqa_shape(const ModelSpec& spec) {
  GqaShape shape;
  if (!spec.is_gqa()) return shape;
  shape.num_heads = spec.num_attention_heads;
  shape.num_kv_heads = spec.num_key_value_heads;
  shape.head_dim = spec.head_dim;
  shape.softmax_scale = softmax_scale(spec);
  return shape;
}

int64_t cache_row_dim(const ModelSpec& spec, Dtype dtype) {
  if (spec.is_gqa()) return gqa_shape(spec).row_dim();
  const MlaShape shape = mla_shape(spec);
  if (dtype != Dtype::kF8E4M3) return shape.latent_dim();
  return shape.lora_rank + shape.lora_rank / 128 * 4 + shape.rope_dim * 2;
}

ModelWeights find_weights(const ModelSpec& spec, TensorTable& table, bool load_mtp) {
  ModelWeights weights;
  weights.embed = table.matrix("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size);
  for (int64_t i = 0; i < spec.num_hidden_layers; ++i) weights.layers.push_back(find_layer(spec, table, i));
  weights.final_norm = table.vector("model.norm.weight", spec.hidden_size);
  weights.lm_head = spec.tie_word_embeddings
                        ? weights.embed
                        : table.matrix("lm_head.weight", spec.vocab_size, spec.hidden_size);
  if (!load_mtp) return weights;

  check(spec.num_mtp_layers > 0, "the checkpoint has no MTP module (num_nextn_predict_layers is 0)");
  const std::string prefix = layer_prefix(spec.num_hidden_layers);
  const std::string head_name = prefix + "shared_head.head.weight";
  MtpWeights& mtp = weights.mtp.emplace();
  mtp.enorm = table.vector(prefix + "enorm.weight", spec.hidden_size);
  mtp.hnorm = table.vector(prefix + "hnorm.weight", spec.hidden_size);
  mtp.eh_proj = table.matrix(prefix + "eh_proj.weight", spec.hidden_size, 2 * spec.hidden_size);
  mtp.layer = find_layer(spec, table, spec.num_hidden_layers);
  mtp.head_norm = table.vector(prefix + "shared_head.norm.weight", spec.hidden_size);
  mtp.head =
      table.has(head_name) ? table.matrix(head_name, spec.vocab_size, spec.hidden_size) : weights.lm_head;
  return weights;
}

void place_weights(ModelWeights& weights, Ops& ops, const ModelSpec& spec, const TensorTable* table) {
  const void* host_embed = weights.embed.data;
  const void* host_head = weights.lm_head.data;
  if (host_head == host_embed) {
    ops.place(weights.embed);
  } else {
    ops.place_table(weights.embed);
  }
  for (LayerWeights& layer : weights.layers) place_layer(layer, ops, spec.hidden_size, table);
  weights.final_norm = ops.place_vector(weights.final_norm, spec.hidden_size);
  if (host_head == host_embed) {
    weights.lm_head = weights.embed;
  } else {
    place_and_release({&weights.lm_head}, ops, table, [&] { ops.place(weights.lm_head); });
  }
  if (!weights.mtp) return;

  MtpWeights& mtp = *weights.mtp;
  mtp.enorm = ops.place_vector(mtp.enorm, spec.hidden_size);
  mtp.hnorm = ops.place_vector(mtp.hnorm, spec.hidden_size);
  place_and_release({&mtp.eh_proj}, ops, table, [&] { ops.place(mtp.eh_proj); });
  place_layer(mtp.layer, ops, spec.hidden_size, table);
  mtp.head_norm = ops.place_vector(mtp.head_norm, spec.hidden_size);
  if (mtp.head.data == host_head) {
    mtp.head = weights.lm_head;
  } else {
    place_and_release({&mtp.head}, ops, table, [&] { ops.place(mtp.head); });
  }
}

std::vector<TensorEntry> needed_entries(const ModelSpec& spec, const std::vector<TensorEntry>& entries,
                                        bool load_mtp) {
  // Layers from here on are not loaded: all MTP modules, or those after the first.
  const int64_t end_layer = spec.num_hidden_layers + (load_mtp ? 1 : 0);
  const std::string prefix = "model.layers.";
  std::vector<TensorEntry> needed;
  for (const TensorEntry& entry : entries) {
    if (entry.name.compare(0, prefix.size(), prefix) == 0) {
      int64_t layer = 0;
      size_t at = prefix.size();
      for (; at < entry.name.size() && entry.name[at] >= '0' && entry.name[at] <= '9' && layer < end_layer;
           ++at) {
        layer = layer * 10 + (entry.name[at] - '0');
      }
      if (layer >= end_layer) continue;
      // The hub repeats the embedding in the MTP module; one copy is enough.
      if (layer == spec.num_hidden_layers &&
          entry.name.compare(at, std::string::npos, ".embed_tokens.weight") == 0) {
        continue;
      }
    } else if (spec.tie_word_embeddings && entry.name == "lm_head.weight") {
      continue;
    }
    needed.push_back(entry);
  }
  return needed;
}

}  // namespace rodin
