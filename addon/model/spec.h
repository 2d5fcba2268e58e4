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
  std::string file;    // absolute path of the shard
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

// Names follow the checkpoint's config.json.
struct ModelSpec {
  std::string model_type;  // "deepseek_v3" | "deepseek_v2"
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
  bool attention_bias = false;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000;
  bool rope_interleave = true;
  std::optional<YarnScaling> yarn;
  bool tie_word_embeddings = false;
  int64_t num_mtp_layers = 0;
  int64_t weight_block_rows = 0;  // weightBlockSize[0]; 0 where no tensor is FP8
  int64_t weight_block_cols = 0;  // weightBlockSize[1]

  bool is_moe_layer(int64_t layer) const {
    if (num_routed_experts == 0) return false;
    if (layer >= num_hidden_layers) return true;  // the MTP module
    return layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
};

// Throws std::runtime_error with one sentence when the values contradict each other or are out of range.
void check_spec(const ModelSpec& spec);

}  // namespace rodin
