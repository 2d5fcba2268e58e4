// A Moonlight-shaped model with synthetic FP8 weights on the GPU, and steps of it as the forward runs them.
#pragma once

#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "engine/host_index.h"
#include "engine/latent_cache.h"
#include "model/forward.h"
#include "ops/sample_args.h"
#include "tests/native/cuda_support.h"

namespace rodin::test {

// Moonlight-16B-A3B, 27 layers of which the first is dense.
inline ModelSpec moonlight(int64_t num_layers) {
  ModelSpec spec;
  spec.model_type = "deepseek_v3";
  spec.vocab_size = 163840;
  spec.hidden_size = 2048;
  spec.intermediate_size = 11264;
  spec.moe_intermediate_size = 1408;
  spec.num_hidden_layers = num_layers;
  spec.num_attention_heads = 16;
  spec.num_shared_experts = 2;
  spec.num_routed_experts = 64;
  spec.num_experts_per_token = 6;
  spec.topk_method = "noaux_tc";
  spec.scoring_func = "sigmoid";
  spec.norm_topk_prob = true;
  spec.routed_scaling_factor = 2.446;
  spec.first_k_dense_replace = 1;
  spec.kv_lora_rank = 512;
  spec.qk_nope_head_dim = 128;
  spec.qk_rope_head_dim = 64;
  spec.v_head_dim = 128;
  spec.max_position_embeddings = 8192;
  spec.rms_norm_eps = 1e-5;
  spec.weight_block_rows = spec.weight_block_cols = 128;
  return spec;
}

// Weights of every role cut from a few shared arrays: what matters is that each has memory of its own on the
// device.
class SyntheticWeights {
 public:
  explicit SyntheticWeights(const ModelSpec& spec) {
    fp8_.resize(size_t{96} << 20);
    bf16_.resize(static_cast<size_t>(spec.vocab_size * spec.hidden_size) + kSlack);
    std::vector<uint8_t> normals(1 << 16);
    CudaRandom own{99};
    for (uint8_t& value : normals) value = e4m3_of_float(own.normal() * 50);
    parallel(fp8_.size(), [&](size_t begin, size_t end) {
      CudaRandom random{begin + 1};
      for (size_t i = begin; i < end; ++i) fp8_[i] = normals[random.next() >> 16];
    });
    parallel(bf16_.size(), [&](size_t begin, size_t end) {
      CudaRandom random{begin + 1};
      for (size_t i = begin; i < end; ++i) {
        bf16_[i] = bf16_of_float((random.uniform() + random.uniform() - 1) * 0.05f);
      }
    });
    scale_.assign(1 << 16, 0);
    for (float& scale : scale_) scale = (0.75f + 0.5f * own.uniform()) / 50;
    ones_.assign(1 << 16, 1.0f);
    zeros_.assign(1 << 10, 0.0f);
    const int64_t hidden = spec.hidden_size;
    weights.embed = bf16(spec.vocab_size, hidden);
    weights.lm_head = bf16(spec.vocab_size, hidden);
    weights.final_norm = ones_.data();
    for (int64_t i = 0; i < spec.num_hidden_layers; ++i) {
      LayerWeights& layer = weights.layers.emplace_back();
      layer.input_norm = layer.post_attention_norm = layer.mla.kv_a_norm = ones_.data();
      MlaWeights& mla = layer.mla;
      mla.shape = mla_shape(spec);
      mla.q_b = fp8(mla.shape.num_heads * mla.shape.qk_dim(), hidden);
      mla.kv_a = fp8(mla.shape.latent_dim(), hidden);
      mla.kv_b = fp8(mla.shape.num_heads * (mla.shape.nope_dim + mla.shape.v_dim), mla.shape.lora_rank);
      mla.o = fp8(hidden, mla.shape.num_heads * mla.shape.v_dim);
      layer.is_moe = spec.is_moe_layer(i);
      if (!layer.is_moe) {
        layer.mlp = mlp(hidden, spec.intermediate_size);
        continue;
      }
      MoeWeights& moe = layer.moe;
      moe.route.num_experts = spec.num_routed_experts;
      moe.route.experts_per_token = spec.num_experts_per_token;
      moe.route.norm_topk_prob = spec.norm_topk_prob;
      moe.route.routed_scaling_factor = static_cast<float>(spec.routed_scaling_factor);
      moe.router = bf16(spec.num_routed_experts, hidden);
      moe.correction_bias = zeros_.data();
      for (int64_t e = 0; e < spec.num_routed_experts; ++e)
        moe.experts.push_back(mlp(hidden, spec.moe_intermediate_size));
      moe.shared = mlp(hidden, spec.moe_intermediate_size * spec.num_shared_experts);
    }
  }

  ModelWeights weights;
  int64_t bytes = 0;

 private:
  static constexpr size_t kSlack = size_t{1} << 22;

  template <class F>
  static void parallel(size_t count, F&& f) {
    const size_t num_threads = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> threads;
    for (size_t i = 0; i < num_threads; ++i) {
      threads.emplace_back(
          [&f, i, count, num_threads] { f(count * i / num_threads, count * (i + 1) / num_threads); });
    }
    for (std::thread& thread : threads) thread.join();
  }

  Weight bf16(int64_t rows, int64_t cols) {
    Weight weight;
    weight.dtype = Dtype::kBF16;
    weight.rows = rows;
    weight.cols = cols;
    weight.data = bf16_.data() + static_cast<size_t>(random_.below(kSlack));
    bytes += rows * cols * 2;
    return weight;
  }
  Weight fp8(int64_t rows, int64_t cols) {
    Weight weight;
    weight.dtype = Dtype::kF8E4M3;
    weight.rows = rows;
    weight.cols = cols;
    weight.block_rows = weight.block_cols = 128;
    weight.data = fp8_.data() + random_.below(static_cast<int64_t>(fp8_.size()) - rows * cols);
    // The scales of all matrices are alike, so that 1 / sqrt(cols) is put in by the caller's norms.
    weight.scale = scales_of(cols);
    bytes += rows * cols;
    return weight;
  }
  MlpWeights mlp(int64_t hidden, int64_t size) {
    return {fp8(size, hidden), fp8(size, hidden), fp8(hidden, size)};
  }
  const float* scales_of(int64_t cols) {
    Floats& scaled = scaled_[cols];
    if (scaled.empty()) {
      for (const float scale : scale_) scaled.push_back(scale / std::sqrt(static_cast<float>(cols)));
    }
    return scaled.data();
  }

  CudaRandom random_{5};
  std::vector<uint8_t> fp8_;
  std::vector<uint16_t> bf16_;
  Floats scale_, ones_, zeros_;
  std::map<int64_t, Floats> scaled_;
};

// A loaded forward and one decode step over `batch` sequences of `context` tokens.
class StepRig {
 public:
  static constexpr int64_t kBlock = 64;

  StepRig(const ModelSpec& spec, int64_t max_batch, int64_t max_context, bool is_deterministic = true,
          int64_t max_step_tokens = 0)
      : spec_(spec), synthetic_(spec), gpu_(make_gpu("auto", is_deterministic)) {
    const auto start = std::chrono::steady_clock::now();
    place_weights(synthetic_.weights, *gpu_, spec_);
    OpsLimits limits;
    max_step_tokens = std::max(max_step_tokens, max_batch);
    limits.max_step_tokens = max_step_tokens;
    limits.max_num_seqs = max_batch;
    limits.max_logit_rows = max_batch;
    limits.num_blocks = max_batch * ((max_context + kBlock - 1) / kBlock);
    limits.block_size = kBlock;
    limits.hidden_size = spec.hidden_size;
    limits.vocab_size = spec.vocab_size;
    limits.max_linear_inputs = spec.intermediate_size;
    limits.intermediate_size = spec.intermediate_size;
    limits.num_experts = spec.num_routed_experts;
    limits.experts_per_token = spec.num_experts_per_token;
    limits.moe_intermediate_size = spec.moe_intermediate_size;
    limits.shared_intermediate_size = spec.moe_intermediate_size * spec.num_shared_experts;
    limits.mla = mla_shape(spec);
    gpu_->reserve(limits);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    std::printf("%.1f GB placed in %.2f s\n", static_cast<double>(synthetic_.bytes) / 1e9, elapsed.count());
    forward_ = std::make_unique<Forward>(spec_, synthetic_.weights, *gpu_, max_step_tokens, max_batch);
    cache_ = std::make_unique<LatentCache>(*gpu_, spec.num_hidden_layers, limits.num_blocks, kBlock,
                                           spec.kv_lora_rank + spec.qk_rope_head_dim);
    CudaRandom random{8};
    std::vector<uint16_t> latents(static_cast<size_t>(limits.num_blocks * kBlock * 576));
    for (uint16_t& bits : latents)
      bits = static_cast<uint16_t>(0x3e00 + (random.next() >> 24) + (random.next() >> 31 << 15));
    for (const CacheLayer& layer : cache_->layers())
      gpu_->upload(layer.latents.data, latents.data(), latents.size() * 2);
  }

  // One step; greedy sampling on the device as in Runner, but for the settings. `tokens`: instead of random
  // ones.
  void begin(int64_t batch, int64_t context, uint32_t seed, int64_t first_block = 0,
             const std::vector<int32_t>* tokens = nullptr) {
    CudaRandom random{seed};
    index_.clear();
    step_.block_table.clear();
    step_.block_table_start.assign(1, 0);
    rows_.clear();
    const int64_t blocks_each = (context + kBlock - 1) / kBlock;
    for (int64_t s = 0; s < batch; ++s) {
      for (int64_t b = 0; b < blocks_each; ++b)
        step_.block_table.push_back(static_cast<int32_t>(first_block + b * batch + s));
      step_.block_table_start.push_back(static_cast<int32_t>(step_.block_table.size()));
      const auto position = static_cast<int32_t>(context - 1);
      const int32_t slot = step_.block_table.back() * kBlock + position % kBlock;
      const auto token = static_cast<int32_t>(random.below(spec_.vocab_size));
      index_.add_row(tokens ? (*tokens)[static_cast<size_t>(s)] : token, position, position, slot);
      index_.end_sequence();
      rows_.push_back(static_cast<int32_t>(s));
    }
  }
  // Samples greedily what run() gave, and waits for nothing.
  void begin_sample(const float* logits, int slot, int32_t num_logprobs = 2, float temperature = 0,
                    float top_p = 1) {
    const size_t count = rows_.size();
    sampling_ = SampleBatch{};
    sampling_.temperature.assign(count, temperature);
    sampling_.top_p.assign(count, top_p);
    sampling_.top_k.assign(count, 0);
    sampling_.min_p.assign(count, 0);
    sampling_.seed_low.assign(count, 0);
    sampling_.seed_high.assign(count, 0);
    sampling_.presence_penalty.assign(count, 0);
    sampling_.frequency_penalty.assign(count, 0);
    sampling_.repetition_penalty.assign(count, 1);
    sampling_.num_logprobs.assign(count, num_logprobs);
    for (auto* starts : {&sampling_.history_start, &sampling_.bias_start, &sampling_.mask_start})
      starts->assign(count + 1, 0);
    SampleArgs args;
    args.batch = &sampling_;
    args.logits = logits;
    args.row_seq = rows_.data();
    args.row_position = rows_.data();
    args.num_rows = static_cast<int64_t>(count);
    args.vocab_size = spec_.vocab_size;
    CHECK(gpu_->begin_sample(args, slot));
  }
  SampleResult sampled(int slot) {
    SampleResult result;
    gpu_->finish_sample(slot, result);
    CHECK(gpu_->is_sampled(slot));
    return result;
  }
  // A prompt of which one row gets logits.
  void begin_prompt(int64_t length, uint32_t seed) {
    CudaRandom random{seed};
    index_.clear();
    step_.block_table.clear();
    for (int64_t b = 0; b * kBlock < length; ++b) step_.block_table.push_back(static_cast<int32_t>(b));
    step_.block_table_start = {0, static_cast<int32_t>(step_.block_table.size())};
    for (int32_t position = 0; position < length; ++position) {
      index_.add_row(static_cast<int32_t>(random.below(spec_.vocab_size)), position, position, position);
    }
    index_.end_sequence();
    rows_ = {static_cast<int32_t>(length - 1)};
  }
  const float* run() {
    run_layers();
    return run_head();
  }
  void run_layers() {
    const StepIndex index = gpu_->begin_step(index_.view(step_, kBlock, 0), 0);
    hidden_ = forward_->run(index, cache_->layers());
  }
  const float* run_head() {
    return forward_->logits(hidden_, rows_.data(), static_cast<int64_t>(rows_.size())).row<float>(0);
  }
  // Waits for what run() gave.
  void wait(const float* logits) {
    float word;
    gpu_->download(&word, logits, 4);
  }
  Floats logits(int64_t batch) {
    Floats values(static_cast<size_t>(batch * spec_.vocab_size));
    gpu_->download(values.data(), run(), values.size() * sizeof(float));
    return values;
  }
  int64_t bytes() const { return synthetic_.bytes; }

 private:
  const ModelSpec spec_;
  SyntheticWeights synthetic_;
  std::unique_ptr<Ops> gpu_;
  std::unique_ptr<LatentCache> cache_;
  std::unique_ptr<Forward> forward_;
  HostIndex index_;
  StepBatch step_;
  std::vector<int32_t> rows_;
  Tensor hidden_;
  SampleBatch sampling_;
};

}  // namespace rodin::test
