// A matrix made FP8 at loading: every value the nearest code of its block's scale.
#include "model/quantized_matrix.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/cpu/convert.h"
#include "tests/native/test.h"

namespace rodin {
namespace {

constexpr int64_t kRows = 301, kCols = 213;

Weight view_of(const std::vector<float>& values) {
  Weight weight;
  weight.data = values.data();
  weight.dtype = Dtype::kF32;
  weight.rows = kRows;
  weight.cols = kCols;
  return weight;
}

// Blocks of very different sizes, one of them all zeros.
std::vector<float> random_values() {
  std::vector<float> values;
  uint32_t state = 7;
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t col = 0; col < kCols; ++col) {
      state = state * 1664525u + 1013904223u;
      const float unit = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
      const int64_t block = row / 128 * 2 + col / 128;
      values.push_back(block == 3 ? 0
                                  : unit * unit * unit * std::ldexp(1.0f, static_cast<int>(3 * block) - 8));
    }
  }
  return values;
}

TEST("quantized matrix: each value is the nearest of all codes, whatever the threads") {
  const std::vector<float> values = random_values();
  const QuantizedMatrix made(view_of(values), 3, "x"), alone(view_of(values), 1, "x");
  const Weight& view = made.view();
  CHECK(view.dtype == Dtype::kF8E4M3 && view.rows == kRows && view.cols == kCols && view.block_rows == 128);
  CHECK_EQ(made.bytes(), kRows * kCols + 3 * 2 * int64_t{4});
  const auto* codes = static_cast<const uint8_t*>(view.data);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t col = 0; col < kCols; ++col) {
      const auto at = static_cast<size_t>(row * kCols + col);
      const float scale = view.scale[row / 128 * 2 + col / 128];
      CHECK(codes[at] == static_cast<const uint8_t*>(alone.view().data)[at]);
      const double error = std::fabs(double{float_of_e4m3(codes[at])} - double{values[at]} / double{scale});
      for (const int step : {-1, 1}) {  // codes beside this one are no nearer
        const int beside = (codes[at] & 0x7f) + step;
        if (beside < 0 || beside > 0x7e) continue;
        const auto other = static_cast<uint8_t>((codes[at] & 0x80) | beside);
        CHECK(error <=
              std::fabs(double{float_of_e4m3(other)} - double{values[at]} / double{scale}) + 1e-4 * error);
      }
    }
  }
}

TEST("quantized matrix: the largest value of a block is 448 of its scale, and zeros stay") {
  const std::vector<float> values = random_values();
  const QuantizedMatrix made(view_of(values), 2, "x");
  const auto* codes = static_cast<const uint8_t*>(made.view().data);
  for (int64_t block = 0; block < 6; ++block) {
    int largest = 0;
    for (int64_t row = block / 2 * 128; row < std::min(kRows, block / 2 * 128 + 128); ++row) {
      for (int64_t col = block % 2 * 128; col < std::min(kCols, block % 2 * 128 + 128); ++col)
        largest = std::max(largest, codes[row * kCols + col] & 0x7f);
    }
    CHECK_EQ(largest, block == 3 ? 0 : 0x7e);
  }
  CHECK(made.view().scale[3] == 1.0f);
}

TEST("quantized matrix: what is not finite is refused by name") {
  for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    std::vector<float> values = random_values();
    values[12345] = bad;
    CHECK_THROWS(QuantizedMatrix(view_of(values), 2, "lm_head.weight"), "lm_head.weight holds a value");
  }
}

}  // namespace
}  // namespace rodin
