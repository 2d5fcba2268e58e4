#include "model/quantized_matrix.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "ops/check.h"
#include "ops/cpu/convert.h"

namespace rodin {
namespace {

constexpr float kLargest = 448;  // of e4m3

// The nearest code, ties to the even one; |x| is at most kLargest.
uint8_t e4m3_of_float(float x) {
  const float magnitude = std::fabs(x);
  const auto sign = static_cast<uint8_t>(std::signbit(x) ? 0x80 : 0);
  // Below 2^-6 codes are multiples of 2^-9.
  if (magnitude < 0x1p-6f) return static_cast<uint8_t>(sign | std::lrintf(magnitude * 0x1p9f));
  uint32_t bits = bits_of_float(magnitude);
  bits = (bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20;
  return static_cast<uint8_t>(sign | (bits - (120u << 3)));
}

}  // namespace

QuantizedMatrix::QuantizedMatrix(const Weight& from, int num_threads, const char* name)
    : codes_(from.rows * from.cols) {
  const int64_t block_rows = (from.rows + kBlock - 1) / kBlock;
  const int64_t block_cols = (from.cols + kBlock - 1) / kBlock;
  scales_.resize(static_cast<size_t>(block_rows * block_cols));
  std::atomic<int64_t> next{0};
  std::atomic<bool> is_finite{true};
  const auto work = [&] {
    for (int64_t row = next++; row < block_rows; row = next++) {
      if (!quantize_rows(from, row)) is_finite = false;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  check(is_finite, name, " holds a value that is no finite number and cannot be made FP8");
  view_ = from;
  view_.data = codes_.data();
  view_.dtype = Dtype::kF8E4M3;
  view_.scale = scales_.data();
  view_.block_rows = view_.block_cols = kBlock;
}

int64_t QuantizedMatrix::bytes() const {
  return view_.rows * view_.cols + static_cast<int64_t>(scales_.size() * sizeof(float));
}

bool QuantizedMatrix::quantize_rows(const Weight& from, int64_t block_row) {
  const int64_t first_row = block_row * kBlock, end_row = std::min(first_row + kBlock, from.rows);
  const int64_t block_cols = (from.cols + kBlock - 1) / kBlock;
  std::vector<float> values(static_cast<size_t>((end_row - first_row) * kBlock));  // [rows, kBlock]
  bool is_finite = true;
  for (int64_t block_col = 0; block_col < block_cols; ++block_col) {
    const int64_t first_col = block_col * kBlock, end_col = std::min(first_col + kBlock, from.cols);
    float largest = 0;
    size_t count = 0;
    for (int64_t row = first_row; row < end_row; ++row) {
      for (int64_t col = first_col; col < end_col; ++col) {
        const float value = element_as_float(from.data, from.dtype, row * from.cols + col);
        is_finite = is_finite && std::isfinite(value);
        largest = std::max(largest, std::fabs(value));
        values[count++] = value;
      }
    }
    const float scale = largest > 0 ? largest / kLargest : 1.0f;
    scales_[static_cast<size_t>(block_row * block_cols + block_col)] = scale;
    if (!is_finite) return false;
    const float inverse = 1.0f / scale;
    count = 0;
    for (int64_t row = first_row; row < end_row; ++row) {
      auto* codes = reinterpret_cast<uint8_t*>(codes_.data()) + row * from.cols;
      for (int64_t col = first_col; col < end_col; ++col) {
        codes[col] = e4m3_of_float(std::clamp(values[count++] * inverse, -kLargest, kLargest));
      }
    }
  }
  return true;
}

}  // namespace rodin
