#include "model/spec.h"

#include <cmath>

#include "ops/check.h"

namespace rodin {
namespace {

constexpr int64_t kMaxDim = int64_t{1} << 30;

void check_range(const char* name, int64_t value, int64_t min, int64_t max = kMaxDim) {
  check(value >= min && value <= max, name, " is ", value, "; it must lie in ", min, " .. ", max);
}

void check_positive(const char* name, double value) {
  check(std::isfinite(value) && value > 0, name, " is ", value, "; it must be a positive number");
}

void check_moe(const ModelSpec& spec) {
  check_range("moe_intermediate_size", spec.moe_intermediate_size, 1);
  check_range("num_experts_per_tok", spec.num_experts_per_token, 1, spec.num_routed_experts);
  check_range("n_group", spec.num_expert_groups, 1, spec.num_routed_experts);
  check_range("topk_group", spec.topk_groups, 1, spec.num_expert_groups);
  check_range("moe_layer_freq", spec.moe_layer_freq, 1);
  check_range("first_k_dense_replace", spec.first_k_dense_replace, 0);
  check(std::isfinite(spec.routed_scaling_factor), "routed_scaling_factor is not a finite number");
  check(spec.topk_method == "noaux_tc" || spec.topk_method == "greedy" ||
            spec.topk_method == "group_limited_greedy",
        "topk_method '", spec.topk_method,
        "' is not supported; use noaux_tc, greedy or group_limited_greedy");
  check(spec.scoring_func == "sigmoid" || spec.scoring_func == "softmax", "scoring_func '", spec.scoring_func,
        "' is not supported; use sigmoid or softmax");
  check(spec.num_routed_experts % spec.num_expert_groups == 0, "n_routed_experts (", spec.num_routed_experts,
        ") is no multiple of n_group (", spec.num_expert_groups, ")");
  const int64_t group_size = spec.num_routed_experts / spec.num_expert_groups;
  const bool is_limited = spec.topk_method != "greedy" && spec.num_expert_groups > 1;
  check(!is_limited || group_size * spec.topk_groups >= spec.num_experts_per_token, "topk_group (",
        spec.topk_groups, ") groups of ", group_size, " experts hold fewer than num_experts_per_tok (",
        spec.num_experts_per_token, ")");
  check(!is_limited || spec.topk_method != "noaux_tc" || group_size >= 2,
        "noaux_tc needs at least two experts in a group; n_routed_experts equals n_group");
}

void check_zero(const char* name, int64_t value, const ModelSpec& spec) {
  check(value == 0, name, " is ", value, "; it must be 0 in a model of type ", spec.model_type);
}

void check_mla(const ModelSpec& spec) {
  check_range("kv_lora_rank", spec.kv_lora_rank, 1, 1 << 20);
  check_range("q_lora_rank", spec.q_lora_rank, 0);
  check_range("qk_nope_head_dim", spec.qk_nope_head_dim, 1, 1 << 20);
  check_range("qk_rope_head_dim", spec.qk_rope_head_dim, 2, 1 << 20);
  check(spec.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim (", spec.qk_rope_head_dim, ") is odd");
  check_range("v_head_dim", spec.v_head_dim, 1, 1 << 20);
  check_zero("num_key_value_heads", spec.num_key_value_heads, spec);
  check_zero("head_dim", spec.head_dim, spec);
  check_zero("mlp_bias", spec.mlp_bias, spec);
}

void check_gqa(const ModelSpec& spec) {
  check_range("num_key_value_heads", spec.num_key_value_heads, 1, spec.num_attention_heads);
  check(spec.num_attention_heads % spec.num_key_value_heads == 0, "num_attention_heads (",
        spec.num_attention_heads, ") is no multiple of num_key_value_heads (", spec.num_key_value_heads, ")");
  check_range("head_dim", spec.head_dim, 2, 1 << 16);
  check(spec.head_dim % 2 == 0, "head_dim (", spec.head_dim, ") is odd");
  check(!spec.rope_interleave, "rope_interleave must be false in a model of type ", spec.model_type);
  check_zero("kv_lora_rank", spec.kv_lora_rank, spec);
  check_zero("q_lora_rank", spec.q_lora_rank, spec);
  check_zero("qk_nope_head_dim", spec.qk_nope_head_dim, spec);
  check_zero("qk_rope_head_dim", spec.qk_rope_head_dim, spec);
  check_zero("v_head_dim", spec.v_head_dim, spec);
  check_zero("n_routed_experts", spec.num_routed_experts, spec);
  check_zero("num_nextn_predict_layers", spec.num_mtp_layers, spec);
}

void check_rope(const ModelSpec& spec) {
  check_positive("rope_theta", spec.rope_theta);
  check_positive("rope_scaling.factor", spec.rope_linear_factor);
  const int num_scalings = spec.yarn.has_value() + spec.llama3.has_value() + (spec.rope_linear_factor != 1);
  check(num_scalings <= 1, "the rotary embedding is scaled in ", num_scalings, " ways; one is possible");
  if (spec.yarn) {
    check_positive("rope_scaling.factor", spec.yarn->factor);
    check_positive("rope_scaling.beta_fast", spec.yarn->beta_fast);
    check_positive("rope_scaling.beta_slow", spec.yarn->beta_slow);
    check_positive("rope_scaling.original_max_position_embeddings",
                   spec.yarn->original_max_position_embeddings);
    check(std::isfinite(spec.yarn->mscale) && std::isfinite(spec.yarn->mscale_all_dim),
          "rope_scaling.mscale and mscale_all_dim must be finite numbers");
  }
  if (spec.llama3) {
    check_positive("rope_scaling.factor", spec.llama3->factor);
    check_positive("rope_scaling.low_freq_factor", spec.llama3->low_freq_factor);
    check_positive("rope_scaling.high_freq_factor", spec.llama3->high_freq_factor);
    check_positive("rope_scaling.original_max_position_embeddings",
                   spec.llama3->original_max_position_embeddings);
    check(spec.llama3->high_freq_factor > spec.llama3->low_freq_factor,
          "rope_scaling.high_freq_factor must be above low_freq_factor");
  }
}

}  // namespace

void check_spec(const ModelSpec& spec) {
  check(spec.model_type == "deepseek_v3" || spec.model_type == "deepseek_v2" || spec.is_gqa(), "model_type '",
        spec.model_type, "' is not supported; use a deepseek_v3, deepseek_v2, llama or qwen2 checkpoint");
  check_range("vocab_size", spec.vocab_size, 1);
  check_range("hidden_size", spec.hidden_size, 1);
  check_range("num_hidden_layers", spec.num_hidden_layers, 1, 1 << 16);
  check_range("num_attention_heads", spec.num_attention_heads, 1, 1 << 16);
  check_range("n_routed_experts", spec.num_routed_experts, 0, 1 << 20);
  check_range("n_shared_experts", spec.num_shared_experts, 0, 1 << 16);
  check_range("max_position_embeddings", spec.max_position_embeddings, 1);
  check_range("num_nextn_predict_layers", spec.num_mtp_layers, 0, 1 << 16);
  check_range("weight_block_size[0]", spec.weight_block_rows, 0);
  check_range("weight_block_size[1]", spec.weight_block_cols, 0);
  check((spec.weight_block_rows > 0) == (spec.weight_block_cols > 0), "weight_block_size holds a zero");
  check_positive("rms_norm_eps", spec.rms_norm_eps);
  check_rope(spec);
  if (spec.is_gqa()) {
    check_gqa(spec);
  } else {
    check_mla(spec);
  }
  bool has_dense_layer = false;
  bool has_moe_layer = false;
  check(spec.num_routed_experts == 0 || spec.moe_layer_freq >= 1, "moe_layer_freq must be at least 1");
  for (int64_t i = 0; i < spec.num_hidden_layers + spec.num_mtp_layers; ++i) {
    (spec.is_moe_layer(i) ? has_moe_layer : has_dense_layer) = true;
  }
  if (has_dense_layer) check_range("intermediate_size", spec.intermediate_size, 1);
  if (has_moe_layer) check_moe(spec);
}

}  // namespace rodin
