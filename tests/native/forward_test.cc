// The forward over layers whose device joins ops: a norm that is left to its reader is made there, once, with
// the weight of the layer that reads it.
#include "model/forward.h"

#include "engine/host_index.h"
#include "engine/latent_cache.h"
#include "ops/cpu/reference_ops.h"
#include "tests/native/ops_support.h"

namespace rodin::test {
namespace {

// Joins MoE layers as a device may: where the norm behind one is not asked for, `out` holds NaN.
class JoiningOps final : public ReferenceOps {
 public:
  explicit JoiningOps(int64_t hidden) : ReferenceOps(1), hidden_(hidden) {}

  bool moe_joined(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                  const MoeWeights& moe, const float* next_weight, const Tensor& expert_ids,
                  const Tensor& expert_weights, const Tensor& out) override {
    OpsMatrix normed(out.rows, hidden_, 0), behind(out.rows, hidden_, 0);
    add_rms_norm_route(residual, delta, weight, eps, normed.view, moe, expert_ids, expert_weights);
    moe_add_rms_norm(normed.view, moe, expert_ids, expert_weights, delta, residual,
                     next_weight != nullptr ? next_weight : weight, eps, behind.view);
    num_left += next_weight == nullptr;
    for (int64_t t = 0; t < out.rows; ++t) {
      for (int64_t i = 0; i < hidden_; ++i)
        out.row<float>(t)[i] = next_weight != nullptr ? behind.row(t)[i] : std::nanf("");
    }
    return true;
  }
  int num_left = 0;

 private:
  const int64_t hidden_;
};

// Five layers, of which the first and the third are dense.
struct SmallModel {
  ModelSpec spec;
  ModelWeights weights;

  SmallModel() {
    spec.model_type = "deepseek_v3";
    spec.vocab_size = 50;
    spec.hidden_size = 24;
    spec.intermediate_size = 40;
    spec.moe_intermediate_size = 12;
    spec.num_hidden_layers = 5;
    spec.num_attention_heads = 2;
    spec.num_shared_experts = 1;
    spec.num_routed_experts = 4;
    spec.num_experts_per_token = 2;
    spec.topk_method = "noaux_tc";
    spec.scoring_func = "sigmoid";
    spec.first_k_dense_replace = 1;
    spec.kv_lora_rank = 16;
    spec.qk_nope_head_dim = 8;
    spec.qk_rope_head_dim = 4;
    spec.v_head_dim = 8;
    spec.max_position_embeddings = 64;
    spec.rms_norm_eps = 1e-5;
    const int64_t hidden = spec.hidden_size;
    weights.embed = matrix(spec.vocab_size, hidden);
    weights.lm_head = matrix(spec.vocab_size, hidden);
    weights.final_norm = vector(hidden);
    for (int64_t i = 0; i < spec.num_hidden_layers; ++i) {
      LayerWeights& layer = weights.layers.emplace_back();
      layer.input_norm = vector(hidden), layer.post_attention_norm = vector(hidden);
      MlaWeights& mla = layer.mla;
      mla.shape = mla_shape(spec);
      mla.q_b = matrix(mla.shape.num_heads * mla.shape.qk_dim(), hidden);
      mla.kv_a = matrix(mla.shape.latent_dim(), hidden);
      mla.kv_a_norm = vector(mla.shape.lora_rank);
      mla.kv_b = matrix(mla.shape.num_heads * (mla.shape.nope_dim + mla.shape.v_dim), mla.shape.lora_rank);
      mla.o = matrix(hidden, mla.shape.num_heads * mla.shape.v_dim);
      layer.is_moe = i == 1 || i >= 3;
      if (!layer.is_moe) {
        layer.mlp = mlp(spec.intermediate_size);
        continue;
      }
      layer.moe.route = route_params(spec);
      layer.moe.router = matrix(spec.num_routed_experts, hidden);
      layer.moe.correction_bias = vector(spec.num_routed_experts);
      for (int64_t e = 0; e < spec.num_routed_experts; ++e)
        layer.moe.experts.push_back(mlp(spec.moe_intermediate_size));
      layer.moe.shared = mlp(spec.moe_intermediate_size);
    }
  }

 private:
  Weight matrix(int64_t rows, int64_t cols) {
    matrices_.push_back(std::make_unique<OpsWeight>(random_, rows, cols, Dtype::kF32));
    return matrices_.back()->view;
  }
  const float* vector(int64_t size) {
    vectors_.push_back(std::make_unique<std::vector<float>>(random_vector(random_, size, 1)));
    return vectors_.back()->data();
  }
  MlpWeights mlp(int64_t size) {
    return {matrix(size, spec.hidden_size), matrix(size, spec.hidden_size), matrix(spec.hidden_size, size)};
  }

  OpsRandom random_{31};
  std::vector<std::unique_ptr<OpsWeight>> matrices_;
  std::vector<std::unique_ptr<std::vector<float>>> vectors_;
};

// Logits of every token of one prompt.
std::vector<float> logits_of(Ops& ops, SmallModel& model, int64_t num_tokens) {
  constexpr int64_t kBlock = 16;
  place_weights(model.weights, ops, model.spec);
  OpsLimits limits;
  limits.max_step_tokens = limits.max_logit_rows = num_tokens;
  limits.max_num_seqs = 1;
  limits.num_blocks = 1;
  limits.block_size = kBlock;
  limits.hidden_size = model.spec.hidden_size;
  limits.vocab_size = model.spec.vocab_size;
  limits.max_linear_inputs = limits.intermediate_size = model.spec.intermediate_size;
  limits.num_experts = model.spec.num_routed_experts;
  limits.experts_per_token = model.spec.num_experts_per_token;
  limits.moe_intermediate_size = limits.shared_intermediate_size = model.spec.moe_intermediate_size;
  limits.mla = mla_shape(model.spec);
  ops.reserve(limits);
  Forward forward(model.spec, model.weights, ops, num_tokens, num_tokens);
  const LatentCache cache(ops, model.spec.num_hidden_layers, 1, kBlock, limits.mla.latent_dim());
  HostIndex index;
  index.clear();
  StepBatch step;
  step.block_table = {0};
  step.block_table_start = {0, 1};
  std::vector<int32_t> rows;
  for (int32_t t = 0; t < num_tokens; ++t) {
    index.add_row(7 * t % 50, t, t, t);
    rows.push_back(t);
  }
  index.end_sequence();
  const Tensor hidden = forward.run(ops.begin_step(index.view(step, kBlock, 0), 0), cache.layers());
  const Tensor logits = forward.logits(hidden, rows.data(), num_tokens);
  std::vector<float> values;
  for (int64_t t = 0; t < num_tokens; ++t)
    values.insert(values.end(), logits.row<float>(t), logits.row<float>(t) + model.spec.vocab_size);
  return values;
}

TEST("forward: a norm that a joined MoE layer leaves is made by its reader") {
  for (const int64_t num_tokens : {1, 5}) {
    SmallModel model;
    ReferenceOps plain(1);
    const std::vector<float> wanted = logits_of(plain, model, num_tokens);
    JoiningOps joining(model.spec.hidden_size);
    const std::vector<float> got = logits_of(joining, model, num_tokens);
    for (const float logit : wanted) CHECK(std::isfinite(logit));
    CHECK(got == wanted);
    CHECK_EQ(joining.num_left, 2);  // of three MoE layers the last one's is the final norm
  }
}

}  // namespace
}  // namespace rodin::test
