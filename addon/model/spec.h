// Architecture and tensor table of a checkpoint, in plain values: twin of server/model/spec.ts.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rodin {

// One tensor of one safetensors shard.
struct TensorEntry {
  std::string name;
  std::string dtype;  // "F8_E4M3" | "BF16" | "F16" | "F32"
  std::vector<int64_t> shape;
  std::string file;    // absolute path of the shard; empty: random values, made in memory
  int64_t offset = 0;  // absolute byte offset in the file
  int64_t bytes = 0;
};

struct YarnScaling {
  double factor = 1;
  double beta_fast = 32;
  double beta_slow = 1;
  double mscale = 1;
  double mscale_all_dim = 0;
  double original_max_position_embeddings = 0;
};

// Long wavelengths are stretched by factor, short ones stay, a linear ramp lies between.
struct Llama3Scaling {
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  double original_max_position_embeddings = 0;
};

// Names follow the checkpoint's config.json. deepseek_* have MLA, llama and qwen2 GQA; what belongs to the
// other kind of attention is 0.
struct ModelSpec {
  std::string model_type;  // "deepseek_v3" | "deepseek_v2" | "llama" | "qwen2"
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t moe_intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_shared_experts = 0;
  int64_t num_routed_experts = 0;  // 0: every layer is dense
  int64_t num_experts_per_token = 0;
  int64_t num_expert_groups = 1;
  int64_t topk_groups = 1;
  std::string topk_method;   // "noaux_tc" | "greedy" | "group_limited_greedy"
  std::string scoring_func;  // "sigmoid" | "softmax"
  bool norm_topk_prob = false;
  double routed_scaling_factor = 1;
  int64_t first_k_dense_replace = 0;
  int64_t moe_layer_freq = 1;
  int64_t kv_lora_rank = 0;
  int64_t q_lora_rank = 0;  // 0: q_proj instead of q_a_proj/q_b_proj
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  int64_t num_key_value_heads = 0;  // GQA
  int64_t head_dim = 0;             // GQA
  bool attention_bias = false;      // of q_a, kv_a, o (MLA); q, k, v, o (llama); q, k, v (qwen2)
  bool mlp_bias = false;            // of gate, up, down; llama only
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000;
  bool rope_interleave = true;
  // At most one of these three stretches the rotary embedding.
  std::optional<YarnScaling> yarn;
  std::optional<Llama3Scaling> llama3;
  double rope_linear_factor = 1;  // positions are divided by it
  bool tie_word_embeddings = false;
  int64_t num_mtp_layers = 0;
  int64_t weight_block_rows = 0;  // weightBlockSize[0]; 0 where no tensor is FP8
  int64_t weight_block_cols = 0;  // weightBlockSize[1]

  bool is_gqa() const { return model_type == "llama" || model_type == "qwen2"; }
  int64_t rope_dim() const { return is_gqa() ? head_dim : qk_rope_head_dim; }

  bool is_moe_layer(int64_t layer) const {
    if (num_routed_experts == 0) return false;
    if (layer >= num_hidden_layers) return true;  // the MTP module
    return layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
};

// Throws std::runtime_error with one sentence when the values contradict each other or are out of range.
void check_spec(const ModelSpec& spec);

}  // namespace rodin
