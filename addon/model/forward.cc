#include "model/forward.h"

#include <algorithm>

#include "model/gqa.h"
#include "model/mla.h"
#include "model/moe.h"
#include "model/rope.h"

namespace rodin {

ForwardBuffers ForwardBuffers::first_rows(int64_t num_tokens) const {
  ForwardBuffers at = *this;
  for (Tensor* tensor : {&at.residual, &at.normed, &at.delta, &at.hidden, &at.angles, &at.q_a, &at.q, &at.kv,
                         &at.attention, &at.mlp, &at.expert_ids, &at.expert_weights, &at.mtp_input}) {
    tensor->rows = std::min(tensor->rows, num_tokens);
  }
  return at;
}

Forward::Forward(const ModelSpec& spec, const ModelWeights& weights, Ops& ops, int64_t max_step_tokens,
                 int64_t max_logit_rows)
    : spec_(spec),
      weights_(weights),
      ops_(ops),
      workspace_(ops),
      eps_(static_cast<float>(spec.rms_norm_eps)) {
  const int64_t tokens = max_step_tokens;
  const Dtype dtype = ops.activation_dtype();
  const MlaShape mla = mla_shape(spec);
  const GqaShape gqa = gqa_shape(spec);
  const int64_t gqa_dim = gqa.num_heads * gqa.head_dim;  // 0 where the model has MLA
  const bool has_dense = std::any_of(weights.layers.begin(), weights.layers.end(),
                                     [](const LayerWeights& layer) { return !layer.is_moe; }) ||
                         (weights.mtp && !weights.mtp->layer.is_moe);
  buffers_.residual = workspace_.tensor(tokens, spec.hidden_size, Dtype::kF32);
  buffers_.normed = workspace_.tensor(tokens, spec.hidden_size, dtype);
  buffers_.delta = workspace_.tensor(tokens, spec.hidden_size, dtype);
  buffers_.hidden = workspace_.tensor(tokens, spec.hidden_size, dtype);
  buffers_.angles = workspace_.tensor(tokens, spec.rope_dim(), Dtype::kF32);
  buffers_.q_a = workspace_.tensor(tokens, spec.q_lora_rank, dtype);
  buffers_.q = workspace_.tensor(tokens, mla.num_heads * mla.qk_dim() + gqa_dim, dtype);
  buffers_.kv = workspace_.tensor(tokens, cache_row_dim(spec, dtype), dtype);
  buffers_.attention = workspace_.tensor(tokens, mla.num_heads * mla.v_dim + gqa_dim, dtype);
  buffers_.mlp = workspace_.tensor(has_dense ? tokens : 0, spec.intermediate_size, dtype);
  buffers_.expert_ids = workspace_.tensor(tokens, spec.num_experts_per_token, Dtype::kI32);
  buffers_.expert_weights = workspace_.tensor(tokens, spec.num_experts_per_token, Dtype::kF32);
  buffers_.mtp_input = workspace_.tensor(weights.mtp ? tokens : 0, 2 * spec.hidden_size, dtype);
  buffers_.logits_input = workspace_.tensor(max_logit_rows, spec.hidden_size, dtype);
  buffers_.logits = workspace_.tensor(max_logit_rows, spec.vocab_size, Dtype::kF32);

  const RopeFrequencies frequencies = rope_frequencies(spec);
  const auto count = static_cast<int64_t>(frequencies.inv_freq.size());
  const Tensor inv_freq = workspace_.tensor(1, count, Dtype::kF32);
  ops.upload(inv_freq.data, frequencies.inv_freq.data(), frequencies.inv_freq.size() * sizeof(float));
  rope_ = {inv_freq.row<float>(0), frequencies.multiplier};
}

Forward::~Forward() = default;

Tensor Forward::run(const StepIndex& index, const std::vector<CacheLayer>& cache) {
  const ForwardBuffers at = buffers_.first_rows(index.num_tokens);
  ops_.run_recorded(index, [&] { run_layers(index, cache, at); });
  return at.hidden;
}

void Forward::run_layers(const StepIndex& index, const std::vector<CacheLayer>& cache,
                         const ForwardBuffers& at) {
  const std::vector<LayerWeights>& layers = weights_.layers;
  ops_.rope_table(index, rope_, at.angles);
  ops_.embed(weights_.embed, index, at.residual);
  ops_.rms_norm(at.residual, layers[0].input_norm, eps_, at.normed);
  bool is_normed = true;
  for (size_t i = 0; i < layers.size(); ++i) {
    const bool is_last = i + 1 == layers.size();
    attention(layers[i], is_normed, index, cache[i], at);
    is_normed = mlp(layers[i], is_last ? weights_.final_norm : layers[i + 1].input_norm,
                    !is_last && !layers[i + 1].is_gqa, at, is_last ? at.hidden : at.normed);
  }
}

void Forward::attention(const LayerWeights& layer, bool is_normed, const StepIndex& index,
                        const CacheLayer& cache, const ForwardBuffers& at) {
  if (layer.is_gqa) {
    run_gqa(ops_, layer.gqa, at.normed, index, cache, {at.q, at.kv, at.attention, at.angles}, at.delta);
  } else {
    const PendingNorm norm = {at.residual, layer.input_norm, eps_};
    run_mla(ops_, layer.mla, at.normed, is_normed ? nullptr : &norm, index, cache,
            {at.q_a, at.q, at.kv, at.attention, at.angles}, at.delta);
  }
}

bool Forward::mlp(const LayerWeights& layer, const float* next_norm, bool may_leave_norm,
                  const ForwardBuffers& at, const Tensor& out) {
  if (layer.is_moe) {
    return run_moe(ops_, layer.moe, {layer.post_attention_norm, next_norm, eps_}, at.residual, at.delta,
                   at.normed, at.expert_ids, at.expert_weights, out, may_leave_norm);
  }
  ops_.add_rms_norm(at.residual, at.delta, layer.post_attention_norm, eps_, at.normed);
  run_mlp(ops_, layer.mlp, at.normed, at.mlp, at.delta);
  ops_.add_rms_norm(at.residual, at.delta, next_norm, eps_, out);
  return true;
}

Tensor Forward::head(const Weight& weight, const Tensor& hidden, const int32_t* rows, int64_t num_rows) {
  const Tensor input = buffers_.logits_input.slice_rows(0, num_rows);
  const Tensor out = buffers_.logits.slice_rows(0, num_rows);
  ops_.gather_rows(hidden, rows, input);
  ops_.linear(input, weight, out);
  return out;
}

Tensor Forward::logits(const Tensor& hidden, const int32_t* rows, int64_t num_rows) {
  return head(weights_.lm_head, hidden, rows, num_rows);
}

}  // namespace rodin
