// CUDA: the bandwidth and rates that attention must not fall below. Decodes are timed as they run in a model:
// recorded, one call behind the other on caches of their own. Prints what it measures, with W_UK and W_UV
// and, as nearly as an op can, "alone": where both have 16 columns, they are launches without bytes. "free":
// without
// --deterministic.
#include "tests/native/cuda_speed.h"

namespace rodin::test {
namespace {

struct AttentionSpeed {
  int64_t heads, batch, context, q_len = 1;
  double min_gb_per_s = 0, min_tflops = 0;
  bool is_deterministic = true;
  Dtype cache_dtype = Dtype::kBF16;
  int64_t head_dim = 128;  // of nope and v

  std::string name() const {
    return std::string(is_deterministic || q_len < 64 ? "" : "naive ") + "attention, " +
           std::to_string(heads) + " heads, " + std::to_string(batch) + " x " + std::to_string(q_len) +
           " of " + std::to_string(context) + (cache_dtype == Dtype::kF8E4M3 ? ", FP8" : "") +
           (head_dim < 64 ? ", alone" : "") + (is_deterministic ? "" : ", free");
  }
};

// Gives the outputs.
Floats time_attention(const AttentionSpeed& c) {
  CudaRandom random{1};
  const bool is_fp8 = c.cache_dtype == Dtype::kF8E4M3;
  const std::unique_ptr<Ops> gpu = make_gpu(is_fp8 ? "fp8" : "auto", c.is_deterministic);
  MlaWeights mla;
  mla.shape = {c.heads, c.head_dim, 64, c.head_dim, 512, 0.07f, true};
  std::vector<std::unique_ptr<HostWeight>> hosts;
  const auto add = [&](int64_t rows, int64_t cols) {
    hosts.push_back(random_weight(random, rows, cols, Dtype::kF8E4M3));
    return hosts.back()->view;
  };
  const Floats norm(512, 1.0f);
  const int64_t q_cols = c.heads * mla.shape.qk_dim(), out_cols = c.heads * c.head_dim;
  mla.q_b = add(q_cols, 16);
  mla.kv_a = add(576, 16);
  mla.kv_a_norm = norm.data();
  mla.kv_b = add(c.heads * 2 * c.head_dim, 512);
  mla.o = add(16, out_cols);
  gpu->place(mla);
  const int64_t block_size = 64, blocks_each = (c.context + block_size - 1) / block_size;
  const int64_t tokens = c.batch * c.q_len;
  OpsLimits limits = test_limits(mla.shape);
  limits.max_step_tokens = tokens;
  limits.max_num_seqs = c.batch;
  limits.block_size = block_size;
  limits.num_blocks = c.batch * blocks_each;
  gpu->reserve(limits);

  // FP8 rows: the bits of a scale are near 1/16, those of the rest whatever they are.
  const int64_t num_slots = limits.num_blocks * block_size, row_cols = is_fp8 ? 656 : 576;
  const int64_t row_bytes = is_fp8 ? 656 : 1152;
  std::vector<uint16_t> latents(static_cast<size_t>(num_slots * row_bytes / 2));
  const size_t period = std::min(latents.size(), size_t{1} << 20);
  for (size_t i = 0; i < period; ++i) {
    latents[i] = is_fp8 ? static_cast<uint16_t>(0x3d3d ^ (random.next() >> 25))
                        : static_cast<uint16_t>(0x3e00 + (random.next() >> 24) + (random.next() >> 31 << 15));
  }
  for (size_t i = period; i < latents.size(); ++i) latents[i] = latents[i - period];
  const bool is_decode = c.q_len <= 5 && tokens <= 512;
  constexpr int64_t kCacheBytes = int64_t{600} << 20;
  const int64_t num_calls = is_decode ? std::clamp<int64_t>(kCacheBytes / (num_slots * row_bytes), 1, 16) : 1;
  std::vector<std::unique_ptr<DeviceMatrix>> caches;
  for (int64_t i = 0; i < num_calls; ++i) {
    caches.push_back(std::make_unique<DeviceMatrix>(*gpu, num_slots, row_cols, c.cache_dtype));
    gpu->upload(caches.back()->tensor().data, latents.data(), latents.size() * 2);
  }
  const EvenIndex even(c.batch, c.q_len, c.context, block_size);
  const StepIndex index = gpu->begin_step(even.host(), 0);
  const DeviceMatrix q(*gpu, random_floats(random, tokens * q_cols, 1), tokens, q_cols, Dtype::kBF16);
  const DeviceMatrix out(*gpu, tokens, out_cols, Dtype::kBF16);
  const auto step = [&] {
    for (const auto& cache : caches) gpu->mla_attention(q, mla, index, {*cache}, out);
  };
  const double seconds = seconds_of(*gpu, [&](int) { is_decode ? gpu->run_recorded(index, step) : step(); }) /
                         static_cast<double>(num_calls);
  const double keys = static_cast<double>(c.q_len) * static_cast<double>(c.context - c.q_len / 2);
  // The naive form's operations where it is taken.
  const double operations = c.is_deterministic || c.q_len < 64 ? 1088 : 320;
  report(c.name(), seconds,
         static_cast<double>(c.batch * c.context * row_bytes + c.heads * 2 * c.head_dim * 512),
         2.0 * static_cast<double>(c.batch * c.heads) * keys * operations, c.min_gb_per_s, c.min_tflops);
  return out.get();
}

const bool attention_speed = [] {
  const auto add = [](const AttentionSpeed& c) {
    add_cuda_test("speed of " + c.name(), [c] { time_attention(c); });
  };
  // Decodes: heads, sequences, keys, tokens; floors are about half of what an H200 gave.
  const std::vector<AttentionSpeed> decodes = {
      {16, 1, 1024, 1, 120},       {16, 1, 8192, 1, 170},       {16, 32, 4096, 1, 1300},
      {16, 128, 1024, 1, 950},     {16, 128, 4096, 1, 1600},    {16, 128, 8192, 1, 1800},
      {16, 32, 4096, 4, 700},      {128, 1, 8192, 1, 200},      {128, 8, 4096, 1, 0, 50},
      {128, 32, 4096, 1, 0, 110},  {128, 128, 4096, 1, 0, 110}, {128, 32, 8192, 2, 0, 150},
      {128, 128, 4096, 2, 0, 120},
  };
  for (AttentionSpeed c : decodes) {
    add(c);
    c.min_gb_per_s = c.min_tflops = 0;
    c.is_deterministic = false;
    c.head_dim = 16;
    add(c);
    c.cache_dtype = Dtype::kF8E4M3;
    if (c.heads == 16) add(c);
  }
  add({16, 1, 2048, 2048, 0, 30});
  add({128, 1, 2048, 1024, 0, 38});
  // Expanded keys and values of so many positions are more than the workspace holds for all heads at once.
  add_cuda_test("speed of naive attention, a few heads at a time", [] {
    const Floats naive = time_attention({128, 1, 12000, 64, 0, 0, false});
    check_near(naive, time_attention({128, 1, 12000, 64, 0, 0, true}), 3e-2, "naive and absorbed attention");
  });
  add({16, 1, 1024, 1024, 0, 80, false});
  add({16, 1, 2048, 2048, 0, 180, false});
  add({16, 1, 8192, 8192, 0, 340, false});
  add({128, 1, 4096, 2048, 0, 220, false});
  return true;
}();

}  // namespace
}  // namespace rodin::test
