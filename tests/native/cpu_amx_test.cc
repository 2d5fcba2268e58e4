// What the AMX path alone does: passes of many tokens, few tokens and many to the same bits, and where there
// is AMX, that the emulation of its tiles, which the other tests run everywhere, gives the bits of the
// hardware.
#include <algorithm>

#include "tests/native/ops_support.h"

namespace rodin::test {
namespace {

std::vector<std::string> amx_paths() {
  std::vector<std::string> paths;
  for (const std::string& path : tested_cpu_paths()) {
    if (path.rfind("amxbf16", 0) == 0) paths.push_back(path);
  }
  return paths;
}

// Inputs of magnitudes from far below the smallest normal number's root to large ones.
OpsMatrix wide_inputs(OpsRandom& random, int64_t rows, int64_t cols) {
  OpsMatrix x = OpsMatrix::random_bf16(random, rows, cols, 2);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t k = 0; k < cols; ++k)
      x.row(t)[k] *= std::ldexp(1.0f, static_cast<int>(random.below(120)) - 110);
  }
  return x;
}

OpsMatrix linear_of(Ops& ops, const OpsMatrix& x, const Weight& placed) {
  OpsMatrix out(x.view.rows, placed.rows);
  ops.linear(x.view, placed, out.view);
  return out;
}

struct AmxShape {
  Dtype dtype;
  int64_t rows, cols, block_cols;
};

// A block of scales in one pass and in many, whole steps and not, more steps than a pass takes at once.
const std::vector<AmxShape> kShapes = {{Dtype::kF8E4M3, 100, 392, 128}, {Dtype::kF8E4M3, 16, 256, 64},
                                       {Dtype::kF8E4M3, 130, 132, 96},  {Dtype::kF8E4M3, 48, 600, 256},
                                       {Dtype::kF8E4M3, 70, 200, 1000}, {Dtype::kF8E4M3, 40, 20000, 128},
                                       {Dtype::kBF16, 100, 392, 128}};

const bool kRegistered = [] {
  const std::vector<std::string> paths = amx_paths();
  if (paths.empty()) return true;
  for (const AmxShape& shape : kShapes) {
    const std::string name = std::string(dtype_text(shape.dtype)) + " " + std::to_string(shape.rows) + "x" +
                             std::to_string(shape.cols);
    OpsLimits limits = test_limits();
    limits.max_linear_inputs = std::max(limits.max_linear_inputs, shape.cols);
    for (const std::string& path : paths) {
      add_test("cpu " + path + ": any number of tokens gives a token's bits, " + name, [=] {
        const std::unique_ptr<Ops> ops = make_cpu_ops(path, 2);
        OpsRandom random;
        const OpsWeight weight(random, shape.rows, shape.cols, shape.dtype, true, 128, shape.block_cols);
        Weight placed = weight.view;
        ops->place(placed);
        ops->reserve(limits);
        const OpsMatrix x = wide_inputs(random, 300, shape.cols);
        const OpsMatrix all = linear_of(*ops, x, placed);
        for (int64_t count : {1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 48, 49, 257}) {
          const int64_t first = random.below(300 - count + 1);
          OpsMatrix part(count, shape.rows);
          ops->linear(x.view.slice_rows(first, count), placed, part.view);
          for (int64_t t = 0; t < count; ++t) CHECK(same_bits(part.row(t), all.row(first + t), shape.rows));
          CHECK(part.padding_is_untouched());
        }
      });
    }
    if (paths.front() != "amxbf16") continue;
    add_test("cpu amxbf16: the emulation has the hardware's bits, " + name, [=] {
      OpsRandom random;
      const OpsWeight weight(random, shape.rows, shape.cols, shape.dtype, false, 128, shape.block_cols);
      const OpsMatrix x = wide_inputs(random, 37, shape.cols);
      std::vector<OpsMatrix> results;
      for (const std::string& path : {std::string("amxbf16"), kEmulatedAmx}) {
        const std::unique_ptr<Ops> ops = make_cpu_ops(path, 1);
        Weight placed = weight.view;
        ops->place(placed);
        ops->reserve(limits);
        results.push_back(linear_of(*ops, x, placed));
      }
      for (int64_t t = 0; t < 37; ++t) CHECK(same_bits(results[0].row(t), results[1].row(t), shape.rows));
    });
  }
  return true;
}();

}  // namespace
}  // namespace rodin::test
