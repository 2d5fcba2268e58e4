// CUDA: the bandwidth and rates that the kernels must not fall below, at real shapes and with inputs that are
// not in the cache. Prints what it measures; the floors are about two thirds of what an H100 gave.
#include <array>
#include <chrono>
#include <cstdio>

#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

// Seconds of one call, called often enough to outlast launch times; `round` counts the calls.
template <class F>
double seconds_of(Ops& gpu, F&& call) {
  float word;
  const DeviceMatrix probe(gpu, 1, 1, Dtype::kF32);
  const auto run = [&](int count) {
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < count; ++round) call(round);
    gpu.download(&word, probe.tensor().data, 4);  // waits for the device
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  run(3);
  const double once = run(5) / 5;
  const int count = std::max(5, static_cast<int>(0.03 / once));
  double best = run(count) / count;
  for (int i = 0; i < 2; ++i) best = std::min(best, run(count) / count);
  return best;
}

void report(const std::string& what, double seconds, double bytes, double operations, double min_gb_per_s,
            double min_tflops) {
  const double gb = bytes / seconds / 1e9, tflops = operations / seconds / 1e12;
  std::printf("%-44s %9.1f us %7.0f GB/s %7.1f TFLOP/s\n", what.c_str(), seconds * 1e6, gb, tflops);
  std::fflush(stdout);
  CHECK(gb >= min_gb_per_s);
  CHECK(tflops >= min_tflops);
}

Floats small_inputs(int64_t count) {
  CudaRandom random{2};
  return random_floats(random, count, 1);
}

struct SpeedCase {
  int64_t rows, cols;
  Dtype dtype;
  int64_t tokens;
  double min_gb_per_s, min_tflops;
  bool is_deterministic = true;
};

void time_linear(const SpeedCase& c) {
  CudaRandom random{1};
  const std::unique_ptr<Ops> gpu = make_gpu("auto", c.is_deterministic);
  const auto host = random_weight(random, c.rows, c.cols, c.dtype);
  const int64_t bytes = c.rows * c.cols * dtype_bytes(c.dtype);
  const int64_t copies = std::max<int64_t>(2, (int64_t{160} << 20) / bytes);
  std::vector<Weight> weights(static_cast<size_t>(copies), host->view);
  for (Weight& weight : weights) gpu->place(weight);
  OpsLimits limits = test_limits(small_mla());
  limits.max_step_tokens = std::max<int64_t>(512, c.tokens);
  gpu->reserve(limits);
  const DeviceMatrix x(*gpu, small_inputs(c.tokens * c.cols), c.tokens, c.cols, Dtype::kBF16);
  const DeviceMatrix out(*gpu, c.tokens, c.rows, Dtype::kBF16);
  const double seconds =
      seconds_of(*gpu, [&](int round) { gpu->linear(x, weights[static_cast<size_t>(round % copies)], out); });
  report((c.is_deterministic ? "linear " : "quantised linear ") + std::to_string(c.rows) + "x" +
             std::to_string(c.cols) + (c.dtype == Dtype::kBF16 ? " bf16" : " fp8") + ", " +
             std::to_string(c.tokens) + " tokens",
         seconds, static_cast<double>(bytes + 2 * c.tokens * (c.rows + c.cols)),
         2.0 * static_cast<double>(c.rows * c.cols * c.tokens), c.min_gb_per_s, c.min_tflops);
}

const bool linear_speed = [] {
  const Dtype fp8 = Dtype::kF8E4M3, bf16 = Dtype::kBF16;
  struct Floor {
    int64_t tokens;
    double gb_per_s, tflops;
  };
  const auto add = [](int64_t rows, int64_t cols, Dtype dtype, const std::vector<Floor>& floors) {
    for (const Floor& floor : floors) {
      add_cuda_test("speed of linear " + std::to_string(rows) + "x" + std::to_string(cols) + ", " +
                        std::to_string(floor.tokens),
                    [=] {
                      time_linear({rows, cols, dtype, floor.tokens, floor.gb_per_s, floor.tflops});
                    });
    }
  };
  add(24576, 1536, fp8, {{1, 1450, 0}, {8, 1400, 0}, {16, 1250, 0}, {32, 600, 0}, {64, 0, 65}, {128, 0, 70}});
  add(2112, 7168, fp8, {{1, 700, 0}, {8, 700, 0}, {32, 430, 0}});
  add(7168, 16384, fp8, {{1, 1600, 0}, {8, 1500, 0}, {16, 950, 0}, {32, 850, 0}, {128, 0, 65}});
  add(3648, 2048, fp8, {{1, 450, 0}, {8, 450, 0}, {32, 400, 0}, {64, 0, 35}, {128, 0, 25}});
  add(65536, 2048, bf16, {{1, 1900, 0}, {8, 1900, 0}, {32, 1600, 0}, {64, 1300, 0}});
  add(4096, 7168, fp8, {{512, 0, 115}, {4096, 0, 120}});
  return true;
}();

const bool quantized_speed = [] {
  struct Floor {
    int64_t rows, cols, tokens;
    double tflops;
  };
  for (const auto& [rows, cols, tokens, tflops] :
       {Floor{7168, 16384, 4096, 600}, Floor{4096, 7168, 4096, 550}, Floor{2112, 7168, 4096, 400},
        Floor{24576, 1536, 4096, 450}, Floor{2048, 2048, 1024, 370}, Floor{3648, 2048, 1024, 430},
        Floor{3648, 2048, 256, 180}, Floor{3648, 2048, 64, 50}}) {
    add_cuda_test("speed of quantised linear " + std::to_string(rows) + "x" + std::to_string(cols) + ", " +
                      std::to_string(tokens),
                  [=] {
                    time_linear({rows, cols, Dtype::kF8E4M3, tokens, 0, tflops, false});
                  });
  }
  return true;
}();

struct MoeShape {
  int64_t hidden, size, experts, k, shared;
};
constexpr MoeShape kMoonlight = {2048, 1408, 64, 6, 2816};
constexpr MoeShape kR1 = {7168, 2048, 256, 8, 2048};

// Floors: tokens, GB/s, TFLOP/s.
void time_moe(const MoeShape& shape, bool is_deterministic,
              const std::vector<std::array<double, 3>>& floors) {
  CudaRandom random{1};
  const std::unique_ptr<Ops> gpu = make_gpu("auto", is_deterministic);
  const auto [hidden, size, experts, k, shared] = shape;
  const int64_t most = 2048;
  const auto up = random_weight(random, size, hidden, Dtype::kF8E4M3);
  const auto down = random_weight(random, hidden, size, Dtype::kF8E4M3);
  const auto shared_up = random_weight(random, shared, hidden, Dtype::kF8E4M3);
  const auto shared_down = random_weight(random, hidden, shared, Dtype::kF8E4M3);
  const auto router = random_weight(random, experts, hidden, Dtype::kBF16);
  const Floats bias(static_cast<size_t>(experts), 0.0f);
  MoeWeights moe;
  moe.router = router->view;
  moe.correction_bias = bias.data();
  for (int64_t e = 0; e < experts; ++e) moe.experts.push_back({up->view, up->view, down->view});
  moe.shared = {shared_up->view, shared_up->view, shared_down->view};
  moe.route.num_experts = experts;
  moe.route.experts_per_token = k;
  gpu->place(moe);
  OpsLimits limits = test_limits(small_mla());
  limits.max_step_tokens = most;
  limits.num_experts = experts;
  limits.experts_per_token = k;
  limits.moe_intermediate_size = size;
  limits.shared_intermediate_size = shared;
  limits.hidden_size = hidden;
  gpu->reserve(limits);
  const DeviceMatrix ids(*gpu, most, k, Dtype::kI32);
  const DeviceMatrix weights(*gpu, most, k, Dtype::kF32);
  for (const auto& [token_count, min_gb_per_s, min_tflops] : floors) {
    const auto tokens = static_cast<int64_t>(token_count);
    // Eight sets of inputs, so that a few tokens' experts do not stay in the cache.
    std::vector<std::unique_ptr<DeviceMatrix>> xs;
    for (int i = 0; i < 8; ++i) {
      xs.push_back(std::make_unique<DeviceMatrix>(*gpu, random_floats(random, tokens * hidden, 1), tokens,
                                                  hidden, Dtype::kBF16));
    }
    const DeviceMatrix out(*gpu, tokens, hidden, Dtype::kBF16);
    const double seconds = seconds_of(*gpu, [&](int round) {
      const Tensor& x = xs[static_cast<size_t>(round % 8)]->tensor();
      gpu->route(x, moe, ids, weights);
      gpu->moe(x, moe, ids, weights, out);
    });
    const auto num_experts = static_cast<double>(experts);
    const double hit =
        num_experts * (1 - std::pow(1 - static_cast<double>(k) / num_experts, static_cast<double>(tokens)));
    const double expert_bytes = 3.0 * static_cast<double>(size * hidden);
    report((is_deterministic ? "moe, " : "quantised moe, ") + std::to_string(tokens) + " tokens", seconds,
           expert_bytes * hit + 3.0 * static_cast<double>(shared * hidden),
           2.0 * 3.0 * static_cast<double>(tokens * (k * size + shared) * hidden), min_gb_per_s, min_tflops);
  }
}

const bool moe_speed = add_cuda_test("speed of a Moonlight MoE layer", [] {
  time_moe(kMoonlight, true,
           {{1, 600, 0}, {8, 1200, 0}, {32, 1400, 0}, {128, 900, 0}, {512, 0, 60}, {2048, 0, 85}});
});
const bool quantized_moe_speed = add_cuda_test("speed of a quantised Moonlight MoE layer", [] {
  time_moe(kMoonlight, false, {{64, 1350, 0}, {512, 1250, 0}, {1024, 0, 280}, {2048, 0, 330}});
});
const bool r1_moe_speed = add_cuda_test("speed of a quantised R1 MoE layer", [] {
  time_moe(kR1, false, {{64, 1900, 0}, {512, 1850, 0}});
});

// Gives the outputs.
Floats time_attention(int64_t heads, int64_t batch, int64_t context, int64_t q_len, double min_gb_per_s,
                      double min_tflops, bool is_deterministic = true) {
  CudaRandom random{1};
  const std::unique_ptr<Ops> gpu = make_gpu("auto", is_deterministic);
  MlaWeights mla;
  mla.shape = {heads, 128, 64, 128, 512, 0.07f, true};
  std::vector<std::unique_ptr<HostWeight>> hosts;
  const auto add = [&](int64_t rows, int64_t cols) {
    hosts.push_back(random_weight(random, rows, cols, Dtype::kF8E4M3));
    return hosts.back()->view;
  };
  const Floats norm(512, 1.0f);
  mla.q_b = add(heads * 192, 16);
  mla.kv_a = add(576, 16);
  mla.kv_a_norm = norm.data();
  mla.kv_b = add(heads * 256, 512);
  mla.o = add(16, heads * 128);
  gpu->place(mla);
  const int64_t block_size = 64, blocks_each = (context + block_size - 1) / block_size;
  OpsLimits limits = test_limits(mla.shape);
  limits.max_step_tokens = batch * q_len;
  limits.max_num_seqs = batch;
  limits.block_size = block_size;
  limits.num_blocks = batch * blocks_each;
  gpu->reserve(limits);
  const int64_t num_slots = limits.num_blocks * block_size;
  const DeviceMatrix cache(*gpu, num_slots, 576, Dtype::kBF16);
  std::vector<uint16_t> latents(static_cast<size_t>(num_slots * 576));
  for (uint16_t& bits : latents)
    bits = static_cast<uint16_t>(0x3e00 + (random.next() >> 24) + (random.next() >> 31 << 15));
  gpu->upload(cache.tensor().data, latents.data(), latents.size() * 2);
  std::vector<int32_t> positions, slots, seqs, q_start = {0}, table_start = {0}, table;
  for (int64_t s = 0; s < batch; ++s) {
    for (int64_t i = 0; i < q_len; ++i) {
      positions.push_back(static_cast<int32_t>(context - q_len + i));
      slots.push_back(-1);
      seqs.push_back(static_cast<int32_t>(s));
    }
    q_start.push_back(static_cast<int32_t>(positions.size()));
    for (int64_t b = 0; b < blocks_each; ++b) table.push_back(static_cast<int32_t>(b * batch + s));
    table_start.push_back(static_cast<int32_t>(table.size()));
  }
  StepIndex host;
  host.num_seqs = batch;
  host.num_tokens = batch * q_len;
  host.block_size = block_size;
  host.max_q_len = q_len;
  host.max_context_len = context;
  host.token_ids = host.seq_of_token = seqs.data();
  host.rope_positions = host.cache_positions = positions.data();
  host.slots = slots.data();
  host.q_start = q_start.data();
  host.block_table_start = table_start.data();
  host.block_table = table.data();
  const StepIndex index = gpu->begin_step(host, 0);
  const int64_t tokens = batch * q_len;
  const DeviceMatrix q(*gpu, random_floats(random, tokens * heads * 192, 1), tokens, heads * 192,
                       Dtype::kBF16);
  const DeviceMatrix out(*gpu, tokens, heads * 128, Dtype::kBF16);
  const double seconds = seconds_of(*gpu, [&](int) { gpu->mla_attention(q, mla, index, {cache}, out); });
  const double keys = static_cast<double>(q_len) * static_cast<double>(context - q_len / 2);
  // The naive form's operations where it is taken.
  report((is_deterministic ? "attention, " : "naive attention, ") + std::to_string(heads) + " heads, " +
             std::to_string(batch) + " x " + std::to_string(q_len) + " of " + std::to_string(context),
         seconds, static_cast<double>(batch * context * 1152) + static_cast<double>(heads) * 256 * 512,
         2.0 * static_cast<double>(batch * heads) * keys * (is_deterministic ? 1088 : 320), min_gb_per_s,
         min_tflops);
  return out.get();
}

const bool attention_speed = [] {
  const auto add = [](int64_t heads, int64_t batch, int64_t context, int64_t q_len, double min_gb_per_s,
                      double min_tflops) {
    add_cuda_test("speed of attention " + std::to_string(heads) + ", " + std::to_string(batch) + " x " +
                      std::to_string(q_len) + " of " + std::to_string(context),
                  [=] { time_attention(heads, batch, context, q_len, min_gb_per_s, min_tflops); });
  };
  add(16, 1, 1024, 1, 70, 0);
  add(16, 1, 8192, 1, 90, 0);
  add(128, 1, 8192, 1, 100, 0);
  add(16, 32, 4096, 1, 900, 0);
  add(16, 128, 1024, 1, 500, 0);
  add(16, 128, 4096, 1, 1000, 0);
  add(128, 32, 4096, 1, 0, 50);
  add(16, 1, 2048, 2048, 0, 30);
  add(128, 1, 2048, 1024, 0, 38);
  const auto add_naive = [](int64_t heads, int64_t batch, int64_t context, int64_t q_len, double min_tflops) {
    add_cuda_test("speed of naive attention " + std::to_string(heads) + ", " + std::to_string(batch) + " x " +
                      std::to_string(q_len) + " of " + std::to_string(context),
                  [=] { time_attention(heads, batch, context, q_len, 0, min_tflops, false); });
  };
  // Expanded keys and values of so many positions are more than the workspace holds for all heads at once.
  add_cuda_test("speed of naive attention, a few heads at a time", [] {
    const Floats naive = time_attention(128, 1, 12000, 64, 0, 0, false);
    check_near(naive, time_attention(128, 1, 12000, 64, 0, 0, true), 3e-2, "naive and absorbed attention");
  });
  add_naive(16, 1, 1024, 1024, 80);
  add_naive(16, 1, 2048, 2048, 180);
  add_naive(16, 1, 8192, 8192, 340);
  add_naive(128, 1, 4096, 2048, 220);
  return true;
}();

}  // namespace
}  // namespace rodin::test
