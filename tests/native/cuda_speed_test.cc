// CUDA: the bandwidth and rates that linear layers and experts must not fall below, at real shapes and with
// inputs that are not in the cache. Prints what it measures; the floors are about two thirds of what an H100
// gave.
#include <array>

#include "tests/native/cuda_speed.h"

namespace rodin::test {
namespace {

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

}  // namespace
}  // namespace rodin::test
