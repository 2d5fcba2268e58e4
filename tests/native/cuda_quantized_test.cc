// CUDA: layers of many tokens, whose inputs are quantised, against the float32 reference of the same
// quantised inputs. Outputs are poisoned.
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

constexpr int64_t kBlock = 128;  // channels of a scale

// Each row's blocks of channels in e4m3 and back.
Floats quantized(const Floats& x, int64_t rows, int64_t cols) {
  Floats out(x.size());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t first = 0; first < cols; first += kBlock) {
      const int64_t end = std::min(first + kBlock, cols);
      float most = 0;
      for (int64_t i = first; i < end; ++i)
        most = std::max(most, std::fabs(x[static_cast<size_t>(row * cols + i)]));
      const float inverse = most == 0 ? 0.0f : 448.0f / most;
      for (int64_t i = first; i < end; ++i) {
        const auto at = static_cast<size_t>(row * cols + i);
        out[at] = float_of_e4m3(e4m3_of_float(x[at] * inverse)) * (most / 448.0f);
      }
    }
  }
  return out;
}

std::unique_ptr<Ops> make_quantizing_gpu() { return make_gpu("auto", false); }

struct QuantizedCase {
  int64_t rows, cols, tokens;
  int64_t block = 128;
  bool has_bias = false;
};

void check_linear(const QuantizedCase& c) {
  CudaRandom random{7};
  const std::unique_ptr<Ops> gpu = make_quantizing_gpu();
  ReferenceOps reference(16);
  const auto weight = random_weight(random, c.rows, c.cols, Dtype::kF8E4M3, c.block, c.has_bias);
  const auto other = random_weight(random, 200, c.cols, Dtype::kF8E4M3, c.block);
  Weight placed = weight->view, placed_other = other->view;
  gpu->place(placed);
  gpu->place(placed_other);
  OpsLimits limits = test_limits(small_mla());
  limits.max_step_tokens = std::max<int64_t>(c.tokens, 512);
  gpu->reserve(limits);
  Floats x = random_floats(random, c.tokens * c.cols, 1);
  x[3] = 60;  // an outlier in the first block
  std::fill(x.begin() + c.cols, x.begin() + 2 * c.cols, 0.0f);
  round_to_bf16(x);
  const DeviceMatrix device_x(*gpu, x, c.tokens, c.cols, Dtype::kBF16, 8);
  Floats inputs = quantized(x, c.tokens, c.cols);
  Floats wanted(static_cast<size_t>(c.tokens * c.rows)), wanted_other(static_cast<size_t>(c.tokens * 200));
  reference.linear(host_tensor(inputs, c.tokens, c.cols), weight->view,
                   host_tensor(wanted, c.tokens, c.rows));
  reference.linear(host_tensor(inputs, c.tokens, c.cols), other->view,
                   host_tensor(wanted_other, c.tokens, 200));
  const DeviceMatrix out(*gpu, c.tokens, c.rows, Dtype::kBF16, 5);  // rows at odd places
  gpu->linear(device_x, placed, out);
  check_near(out.get(), wanted, 1.5 * kBf16Tolerance, "linear");
  const DeviceMatrix first(*gpu, c.tokens, c.rows, Dtype::kBF16, 8),
      second(*gpu, c.tokens, 200, Dtype::kBF16);
  gpu->linear_pair(device_x, placed, first, placed_other, second);
  check_near(first.get(), wanted, 1.5 * kBf16Tolerance, "pair, first");
  check_near(second.get(), wanted_other, 1.5 * kBf16Tolerance, "pair, second");
  // Few tokens keep bf16 inputs.
  const int64_t few = 20;
  Floats wanted_few(static_cast<size_t>(few * c.rows));
  reference.linear(host_tensor(x, few, c.cols), weight->view, host_tensor(wanted_few, few, c.rows));
  const DeviceMatrix out_few(*gpu, few, c.rows, Dtype::kBF16);
  gpu->linear(device_x.tensor().slice_rows(0, few), placed, out_few);
  check_near(out_few.get(), wanted_few, kBf16Tolerance, "few tokens");
}

const bool linear_tests = [] {
  for (const QuantizedCase& c :
       {QuantizedCase{1031, 640, 129}, QuantizedCase{576, 2048, 128, 128, true}, QuantizedCase{200, 72, 65},
        QuantizedCase{320, 1000, 300, 1 << 20}, QuantizedCase{256, 384, 1100}, QuantizedCase{64, 128, 64},
        QuantizedCase{2112, 7168, 256}}) {
    add_cuda_test("quantised linear " + std::to_string(c.rows) + "x" + std::to_string(c.cols) + ", " +
                      std::to_string(c.tokens) + " tokens",
                  [c] { check_linear(c); });
  }
  return true;
}();

struct Experts {
  std::vector<std::unique_ptr<HostWeight>> weights;
  MoeWeights host, placed;
};

void check_moe(int64_t hidden, int64_t size, int64_t shared, int64_t num_experts, int64_t tokens) {
  CudaRandom random{5};
  const std::unique_ptr<Ops> gpu = make_quantizing_gpu();
  ReferenceOps reference(16);
  Experts layer;
  const auto add = [&](int64_t rows, int64_t cols, Dtype dtype) {
    layer.weights.push_back(random_weight(random, rows, cols, dtype));
    return layer.weights.back()->view;
  };
  const auto mlp = [&](int64_t inner) {
    const Dtype fp8 = Dtype::kF8E4M3;
    return MlpWeights{add(inner, hidden, fp8), add(inner, hidden, fp8), add(hidden, inner, fp8)};
  };
  const int64_t k = 3;
  MoeWeights& moe = layer.host;
  moe.router = add(num_experts, hidden, Dtype::kBF16);
  moe.route.num_experts = num_experts;
  moe.route.experts_per_token = k;
  moe.route.topk_method = TopkMethod::kGreedy;
  for (int64_t e = 0; e < num_experts; ++e) moe.experts.push_back(mlp(size));
  if (shared > 0) moe.shared = mlp(shared);
  layer.placed = moe;
  gpu->place(layer.placed);
  OpsLimits limits = test_limits(small_mla());
  limits.hidden_size = hidden;
  limits.num_experts = num_experts;
  limits.experts_per_token = k;
  limits.moe_intermediate_size = size;
  limits.shared_intermediate_size = shared;
  gpu->reserve(limits);

  Floats x = random_floats(random, tokens * hidden, 1);
  round_to_bf16(x);
  // Experts 1 and 2 take every token, expert 0 none, the others what is left.
  std::vector<int32_t> ids(static_cast<size_t>(tokens * k));
  Floats weights;
  for (int64_t t = 0; t < tokens; ++t) {
    ids[static_cast<size_t>(t * k)] = 2;
    ids[static_cast<size_t>(t * k + 1)] = static_cast<int32_t>(3 + random.below(num_experts - 3));
    ids[static_cast<size_t>(t * k + 2)] = 1;
    for (int64_t j = 0; j < k; ++j) weights.push_back(0.2f + random.uniform());
  }
  Floats inputs = quantized(x, tokens, hidden);
  Floats wanted(static_cast<size_t>(tokens * hidden));
  const auto run_mlp = [&](const MlpWeights& expert, int64_t inner) {
    Floats mid(static_cast<size_t>(tokens * inner)), out(static_cast<size_t>(tokens * hidden));
    reference.gate_up_silu(host_tensor(inputs, tokens, hidden), expert, host_tensor(mid, tokens, inner));
    mid = quantized(mid, tokens, inner);
    reference.linear(host_tensor(mid, tokens, inner), expert.down, host_tensor(out, tokens, hidden));
    return out;
  };
  for (int64_t e = 0; e < num_experts; ++e) {
    const Floats out = run_mlp(moe.experts[static_cast<size_t>(e)], size);
    for (int64_t slot = 0; slot < tokens * k; ++slot) {
      if (ids[static_cast<size_t>(slot)] != e) continue;
      for (int64_t i = 0; i < hidden; ++i) {
        wanted[static_cast<size_t>(slot / k * hidden + i)] +=
            weights[static_cast<size_t>(slot)] * out[static_cast<size_t>(slot / k * hidden + i)];
      }
    }
  }
  if (shared > 0) {
    const Floats out = run_mlp(moe.shared, shared);
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] += out[i];
  }
  const DeviceMatrix device_x(*gpu, x, tokens, hidden, Dtype::kBF16);
  const DeviceMatrix device_ids(*gpu, tokens, k, Dtype::kI32);
  gpu->upload(device_ids.tensor().data, ids.data(), ids.size() * sizeof(int32_t));
  const DeviceMatrix device_weights(*gpu, weights, tokens, k, Dtype::kF32);
  const DeviceMatrix out(*gpu, tokens, hidden, Dtype::kBF16);
  gpu->moe(device_x, layer.placed, device_ids, device_weights, out);
  // The tensor cores add products of FP8 to about 14 bits, so that some intermediate results fall to the
  // other of two neighbouring e4m3 values, a sixteenth away.
  check_near(out.get(), wanted, 4 * kBf16Tolerance, "moe");
}

const bool moe_tests = [] {
  add_cuda_test("quantised moe with a shared expert", [] { check_moe(512, 320, 640, 8, 300); });
  add_cuda_test("quantised moe, odd widths", [] { check_moe(328, 200, 0, 5, 261); });
  return true;
}();

}  // namespace
}  // namespace rodin::test
