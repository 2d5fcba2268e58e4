// check_spec on models with grouped-query attention: what a llama or qwen2 spec may hold.
#include "model/spec.h"

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "model/rope.h"
#include "tests/native/test.h"

namespace rodin::test {
namespace {

ModelSpec llama() {
  ModelSpec spec;
  spec.model_type = "llama";
  spec.vocab_size = 16;
  spec.hidden_size = 48;
  spec.intermediate_size = 64;
  spec.num_hidden_layers = 2;
  spec.num_attention_heads = 6;
  spec.num_key_value_heads = 2;
  spec.head_dim = 8;
  spec.max_position_embeddings = 64;
  spec.rope_interleave = false;
  return spec;
}

TEST("spec: llama and qwen2 are accepted, with either scaling") {
  ModelSpec spec = llama();
  check_spec(spec);
  spec.llama3 = Llama3Scaling{8, 1, 4, 64};
  check_spec(spec);
  spec.model_type = "qwen2";
  spec.llama3.reset();
  spec.rope_linear_factor = 4;
  check_spec(spec);
}

TEST("spec: what contradicts grouped-query attention is refused by name") {
  const std::vector<std::pair<std::function<void(ModelSpec&)>, std::string>> cases = {
      {[](ModelSpec& s) { s.model_type = "qwen3"; }, "model_type 'qwen3' is not supported"},
      {[](ModelSpec& s) { s.num_key_value_heads = 0; }, "num_key_value_heads is 0"},
      {[](ModelSpec& s) { s.num_key_value_heads = 4; }, "no multiple of num_key_value_heads (4)"},
      {[](ModelSpec& s) { s.num_key_value_heads = 12; }, "num_key_value_heads is 12"},
      {[](ModelSpec& s) { s.head_dim = 7; }, "head_dim (7) is odd"},
      {[](ModelSpec& s) { s.head_dim = 0; }, "head_dim is 0"},
      {[](ModelSpec& s) { s.rope_interleave = true; }, "rope_interleave must be false"},
      {[](ModelSpec& s) { s.kv_lora_rank = 8; }, "kv_lora_rank is 8; it must be 0 in a model of type llama"},
      {[](ModelSpec& s) { s.num_routed_experts = 4; }, "n_routed_experts is 4; it must be 0"},
      {[](ModelSpec& s) { s.num_mtp_layers = 1; }, "num_nextn_predict_layers is 1; it must be 0"},
      {[](ModelSpec& s) { s.intermediate_size = 0; }, "intermediate_size is 0"},
      {[](ModelSpec& s) { s.rope_linear_factor = 0; }, "rope_scaling.factor is 0"},
      {[](ModelSpec& s) {
         s.llama3 = Llama3Scaling{8, 4, 4, 64};
       },
       "high_freq_factor must be above"},
      {[](ModelSpec& s) {
         s.llama3 = Llama3Scaling{8, 1, 4, 0};
       },
       "original_max_position_embeddings is 0"},
      {[](ModelSpec& s) {
         s.llama3 = Llama3Scaling{8, 1, 4, 64};
         s.rope_linear_factor = 2;
       },
       "scaled in 2 ways"},
  };
  for (const auto& [change, message] : cases) {
    ModelSpec spec = llama();
    change(spec);
    CHECK_THROWS(check_spec(spec), message);
  }
}

TEST("spec: MLA does not take the other family's fields") {
  ModelSpec spec = llama();
  spec.model_type = "deepseek_v3";
  spec.kv_lora_rank = spec.qk_nope_head_dim = spec.v_head_dim = 8;
  spec.qk_rope_head_dim = 8;
  CHECK_THROWS(check_spec(spec), "num_key_value_heads is 2; it must be 0 in a model of type deepseek_v3");
  spec.num_key_value_heads = 0;
  CHECK_THROWS(check_spec(spec), "head_dim is 8; it must be 0");
  spec.head_dim = 0;
  check_spec(spec);
}

// Original context 2 pi * 64: a frequency f turns 64 f times. Below 1 turn it is divided, above 4 kept.
TEST("rope: llama3 keeps short waves, stretches long ones, mixes between") {
  ModelSpec spec = llama();
  spec.rope_theta = 1e8;
  spec.llama3 = Llama3Scaling{8, 1, 4, 64 * 2 * 3.14159265358979323846};
  const std::vector<float> inv_freq = rope_frequencies(spec).inv_freq;  // [4] unscaled 1, 1e-2, 1e-4, 1e-6
  CHECK_EQ(inv_freq.size(), size_t{4});
  CHECK_EQ(inv_freq[0], 1.0f);
  CHECK_CLOSE(inv_freq[1], 1e-2 / 8, 1e-9);
  CHECK_CLOSE(inv_freq[2], 1e-4 / 8, 1e-11);
  spec.rope_theta = 16 * 16;  // 1, 1/4, 1/16, 1/64: 64, 16, 4 and 1 turns
  spec.llama3->high_freq_factor = 7;
  const std::vector<float> mixed = rope_frequencies(spec).inv_freq;
  CHECK_CLOSE(mixed[1], 0.25, 1e-7);
  CHECK_CLOSE(mixed[2], 0.5 / 16 + 0.5 / 16 / 8, 1e-7);  // half way from 1 to 7
  CHECK_CLOSE(mixed[3], 1.0 / 64 / 8, 1e-7);
}

}  // namespace
}  // namespace rodin::test
