// CUDA: linear layers of few tokens with FP8 weights, whose inputs are split into two e4m3 parts: against the
// float32 reference of the unsplit inputs, and the same bits for any number of tokens. Outputs are poisoned.
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

// A bf16 output's own rounding is 1.7e-3 of it; what the tensor cores' sums add is less.
constexpr double kSplitTolerance = 2.5e-3;

constexpr int64_t kOther = 6600;  // rows of a pair's second matrix

struct SplitCase {
  int64_t rows, cols;
  int64_t block = 128;
  bool has_bias = false;
};

// Blocks of inputs of very different sizes, a block of zeros, an outlier, and inputs far below their block's
// largest.
Floats wide_inputs(CudaRandom& random, int64_t rows, int64_t cols) {
  Floats x = random_floats(random, rows * cols, 1);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < cols; ++i) {
      float& value = x[static_cast<size_t>(row * cols + i)];
      const auto block = static_cast<int>(i / 128);
      value = std::ldexp(value, (block * 7 + static_cast<int>(row)) % 5 - 2);
      if (row % 4 == 1) value = std::ldexp(value, -static_cast<int>(random.below(12)));
      if (row % 4 == 2 && block == 1) value = 0;
      if (row % 4 == 3 && i % 128 == 77) value *= 300;
    }
  }
  round_to_bf16(x);
  return x;
}

void check_split(const SplitCase& c) {
  CudaRandom random{static_cast<uint64_t>(c.rows + 7 * c.cols)};
  const std::unique_ptr<Ops> gpu = make_gpu();
  ReferenceOps reference(16);
  const auto a = random_weight(random, c.rows, c.cols, Dtype::kF8E4M3, c.block, c.has_bias);
  const auto b = random_weight(random, kOther, c.cols, Dtype::kF8E4M3, c.block, c.has_bias);
  const auto up = random_weight(random, c.rows, c.cols, Dtype::kF8E4M3, c.block);
  MlpWeights mlp{a->view, up->view, {}};
  mlp.gate.bias = nullptr;
  Weight placed_a = a->view, placed_b = b->view;
  MlpWeights placed_mlp = mlp;
  for (Weight* weight : {&placed_a, &placed_b, &placed_mlp.gate, &placed_mlp.up}) gpu->place(*weight);
  gpu->reserve(test_limits(small_mla()));
  const int64_t most = 75;
  Floats x = wide_inputs(random, most, c.cols);
  Floats wanted(static_cast<size_t>(most * c.rows)), wanted_b(static_cast<size_t>(most * kOther)),
      wanted_gated(wanted.size());
  const Tensor host_x = host_tensor(x, most, c.cols);
  reference.linear(host_x, a->view, host_tensor(wanted, most, c.rows));
  reference.linear(host_x, b->view, host_tensor(wanted_b, most, kOther));
  reference.gate_up_silu(host_x, mlp, host_tensor(wanted_gated, most, c.rows));
  for (const int64_t padding : {int64_t{0}, int64_t{3}}) {  // 3: rows that are not 16-byte aligned
    const DeviceMatrix device_x(*gpu, x, most, c.cols, Dtype::kBF16, padding);
    std::vector<uint8_t> all[4];  // [4] linear, pair, gated
    for (const int64_t tokens : {75, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64}) {
      const int64_t first = most - tokens;
      const Tensor some = device_x.tensor().slice_rows(first, tokens);
      const DeviceMatrix out(*gpu, tokens, c.rows, Dtype::kBF16), out_a(*gpu, tokens, c.rows, Dtype::kBF16),
          out_b(*gpu, tokens, kOther, Dtype::kBF16), gated(*gpu, tokens, c.rows, Dtype::kBF16);
      gpu->linear(some, placed_a, out);
      gpu->linear_pair(some, placed_a, out_a, placed_b, out_b);
      gpu->gate_up_silu(some, placed_mlp, gated);
      const DeviceMatrix* outs[4] = {&out, &out_a, &out_b, &gated};
      for (int i = 0; i < 4; ++i) {
        const std::vector<uint8_t> raw = outs[i]->raw();
        if (tokens == most) {
          const Floats& right = i == 2 ? wanted_b : i == 3 ? wanted_gated : wanted;
          check_near(outs[i]->get(), right, i == 3 ? 2 * kSplitTolerance : kSplitTolerance,
                     "form " + std::to_string(i));
          all[i] = raw;
        }
        const size_t row_bytes = raw.size() / static_cast<size_t>(tokens);
        check_same_bits(raw,
                        {all[i].begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(first) * row_bytes),
                         all[i].end()},
                        "form " + std::to_string(i) + " of " + std::to_string(tokens) + " tokens");
      }
      check_same_bits(out.raw(), out_a.raw(), "a pair's first");
    }
  }
}

const bool split_tests = [] {
  for (const SplitCase& c :
       {SplitCase{7168, 2048}, SplitCase{6431, 640, 128, true}, SplitCase{6400, 72}, SplitCase{6400, 16},
        SplitCase{6500, 1000, 1 << 20}, SplitCase{6464, 4352, 256}}) {
    add_cuda_test("split linear " + std::to_string(c.rows) + "x" + std::to_string(c.cols),
                  [c] { check_split(c); });
  }
  return true;
}();

// What is not finite must not come out as if it were.
const bool nan_test = add_cuda_test("split linear of infinities and NaNs", [] {
  CudaRandom random{3};
  const std::unique_ptr<Ops> gpu = make_gpu();
  const auto weight = random_weight(random, 6400, 300, Dtype::kF8E4M3);
  Weight placed = weight->view;
  gpu->place(placed);
  gpu->reserve(test_limits(small_mla()));
  Floats x = random_floats(random, 3 * 300, 1);
  x[130] = INFINITY;
  x[600 + 299] = NAN;
  const DeviceMatrix device_x(*gpu, x, 3, 300, Dtype::kBF16), out(*gpu, 3, 6400, Dtype::kBF16);
  gpu->linear(device_x, placed, out);
  const Floats got = out.get();
  for (size_t i = 0; i < got.size(); ++i) CHECK_EQ(std::isfinite(got[i]), i / 6400 == 1);
});

}  // namespace
}  // namespace rodin::test
