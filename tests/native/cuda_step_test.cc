// CUDA: a whole decode step of a Moonlight-shaped model with synthetic FP8 weights, as the forward runs it,
// and the bits of a recorded step.
#include <chrono>
#include <cstdio>
#include <map>
#include <thread>

#include "engine/host_index.h"
#include "engine/latent_cache.h"
#include "model/forward.h"
#include "ops/sample_args.h"
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

// Moonlight-16B-A3B, 27 layers of which the first is dense.
ModelSpec moonlight(int64_t num_layers) {
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

struct StepFloor {
  int64_t batch;
  double limit;  // tokens/s that an H100's memory allows
  double share;  // of it; a little below what was reached
};

void time_steps(bool is_deterministic, const std::vector<StepFloor>& floors) {
  StepRig rig(moonlight(27), 128, 1024, is_deterministic);
  bool is_fast = true;
  for (const auto& [batch, limit, share] : floors) {
    double best = 1e9, unrecorded = 0;
    for (int round = 0; round < 30; ++round) {
      rig.begin(batch, 1024, static_cast<uint32_t>(round + 1));
      const auto start = std::chrono::steady_clock::now();
      rig.wait(rig.run());
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      if (round == 0) unrecorded = elapsed.count();
      best = std::min(best, elapsed.count());
    }
    const double tokens_per_s = static_cast<double>(batch) / best;
    std::printf(
        "moonlight, batch %3d: %7.2f ms a step (%.2f at first), %7.0f tokens/s, %.0f %% of the limit\n",
        static_cast<int>(batch), best * 1e3, unrecorded * 1e3, tokens_per_s, tokens_per_s / limit * 100);
    std::fflush(stdout);
    is_fast = is_fast && tokens_per_s >= share * limit;
  }
  CHECK(is_fast);
}

const bool step_speed = [] {
  add_cuda_test("speed of a Moonlight step", [] {
    time_steps(true, {{1, 1020, 0.38}, {8, 2499, 0.58}, {32, 5963, 0.57}, {128, 20243, 0.38}});
  });
  add_cuda_test("speed of a Moonlight step of quantised layers",
                [] { time_steps(false, {{64, 11000, 0.48}, {128, 20243, 0.43}}); });
  return true;
}();

// Each part enqueued again and again, so that no launch is waited for.
const bool part_speed = add_cuda_test("speed of a Moonlight step's parts", [] {
  StepRig rig(moonlight(27), 32, 1024, false);
  for (const int64_t batch : {1, 32}) {
    rig.begin(batch, 1024, 1);
    const float* logits = rig.run();
    const auto micros_of = [&](auto&& part) {
      constexpr int kRounds = 40;
      double best = 1e9;
      for (int repeat = 0; repeat < 4; ++repeat) {
        rig.wait(logits);
        const auto start = std::chrono::steady_clock::now();
        for (int round = 0; round < kRounds; ++round) part(round);
        rig.wait(logits);
        const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
        best = std::min(best, elapsed.count() / kRounds);
      }
      return best;
    };
    const double layers = micros_of([&](int) { rig.run_layers(); });
    const double head = micros_of([&](int) { rig.run_head(); });
    const double sampling = micros_of([&](int round) { rig.begin_sample(logits, round % 2, -1); });
    const double logprobs = micros_of([&](int round) { rig.begin_sample(logits, round % 2, 0); });
    const double likeliest = micros_of([&](int round) { rig.begin_sample(logits, round % 2, 20); });
    const double noise = micros_of([&](int round) { rig.begin_sample(logits, round % 2, -1, 1); });
    const double nucleus =
        micros_of([&](int round) { rig.begin_sample(logits, round % 2, -1, 0.6f, 0.95f); });
    const double all = micros_of([&](int round) { rig.begin_sample(rig.run(), round % 2, -1); });
    std::printf(
        "moonlight, batch %2d: layers %.0f us, head %.0f, greedy %.0f, with a logprob %.0f, with 20 %.0f, "
        "with noise %.0f, top_p %.0f; a step %.0f\n",
        static_cast<int>(batch), layers, head, sampling, logprobs, likeliest, noise, nucleus, all);
    std::fflush(stdout);
    CHECK(sampling < 0.05 * all && nucleus < 0.1 * all);
  }
});

const bool prompt_speed = add_cuda_test("speed of a Moonlight prompt", [] {
  StepRig rig(moonlight(27), 1, 8192, false, 8192);
  bool is_fast = true;
  for (const auto& [length, most_ms] : {std::pair{512, 15.0}, {1024, 18.0}, {2048, 30.0}, {8192, 120.0}}) {
    double best = 1e9;
    for (int round = 0; round < 8; ++round) {
      rig.begin_prompt(length, static_cast<uint32_t>(round + 1));
      const auto start = std::chrono::steady_clock::now();
      rig.wait(rig.run());
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      best = std::min(best, elapsed.count());
    }
    std::printf("moonlight, a prompt of %4d tokens: %7.2f ms, %.0f tokens/s\n", static_cast<int>(length),
                best * 1e3, static_cast<double>(length) / best);
    std::fflush(stdout);
    is_fast = is_fast && best * 1e3 <= most_ms;
  }
  CHECK(is_fast);
});

// Small enough to be looked at kernel by kernel.
const bool small_steps = [] {
  for (const int64_t batch : {1, 8, 32, 128}) {
    add_cuda_test("step of three layers, batch " + std::to_string(batch), [batch] {
      StepRig rig(moonlight(3), batch, 1024);
      rig.begin(batch, 1024, 1);
      for (const float logit : rig.logits(batch)) CHECK(std::isfinite(logit));
    });
  }
  return true;
}();

const bool small_prompt = add_cuda_test("prompt of three layers", [] {
  StepRig rig(moonlight(3), 1, 1024, false, 1024);
  rig.begin_prompt(1024, 1);
  for (const float logit : rig.logits(1)) CHECK(std::isfinite(logit));
});

const bool recorded_bits = add_cuda_test("step: a recorded step gives the bits of the first", [] {
  StepRig rig(moonlight(2), 36, 700);
  for (const int64_t batch : {1, 3, 17}) {
    const int64_t other_block = 12 * batch;  // the two steps write nothing of one another's
    // The first step of a shape runs unrecorded, the others as a graph over other tokens and contexts.
    rig.begin(batch, 700, 1);
    const Floats first = rig.logits(batch);
    rig.begin(batch, 450, 2, other_block);
    const Floats other = rig.logits(batch);
    CHECK(first != other);
    rig.begin(batch, 700, 1);
    CHECK(rig.logits(batch) == first);
    rig.begin(batch, 450, 2, other_block);
    CHECK(rig.logits(batch) == other);
  }
});

const bool ahead = add_cuda_test("step: tokens that only the device knows give the bits of known ones", [] {
  StepRig rig(moonlight(2), 36, 700);
  for (const int64_t batch : {1, 3, 17}) {
    std::vector<int32_t> rows;  // [batch] each sequence takes another one's token
    for (int64_t s = 0; s < batch; ++s) rows.push_back(static_cast<int32_t>(-1 - (s + 1) % batch));
    for (uint32_t seed = 1; seed < 4; ++seed) {  // unrecorded, recorded, replayed
      rig.begin(batch, 699, seed);
      rig.begin_sample(rig.run(), 0);
      rig.begin(batch, 700, 0, 0, &rows);
      rig.begin_sample(rig.run(), 1);  // two steps are under way
      const SampleResult first = rig.sampled(0), second = rig.sampled(1);
      std::vector<int32_t> known;
      for (int64_t s = 0; s < batch; ++s)
        known.push_back(first.sampled_ids[static_cast<size_t>((s + 1) % batch)]);
      rig.begin(batch, 700, 0, 0, &known);
      rig.begin_sample(rig.run(), 0);
      const SampleResult again = rig.sampled(0);
      CHECK(again.sampled_ids == second.sampled_ids);
      CHECK(again.sampled_logprobs == second.sampled_logprobs);
      CHECK(again.top_ids == second.top_ids);
      CHECK(again.top_logprobs == second.top_logprobs);
      CHECK(first.sampled_ids != second.sampled_ids);
    }
  }
});

}  // namespace
}  // namespace rodin::test
