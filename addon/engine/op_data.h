// Weights and activations for timing single ops: synthetic, normal, and NaN where a call must write.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "model/synthetic.h"
#include "ops/cpu/convert.h"
#include "ops/ops.h"

namespace rodin {

using Floats = std::vector<float>;

inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::kF8E4M3 ? "F8_E4M3" : dtype == Dtype::kBF16 ? "BF16" : "F32";
}

// Keeps the memory of synthetic weights.
class WeightFactory {
 public:
  static constexpr int64_t kScaleBlock = 128;

  Weight make(int64_t rows, int64_t cols, Dtype dtype) {
    Weight weight;
    weight.dtype = dtype;
    weight.rows = rows;
    weight.cols = cols;
    weight.data = fill({"w" + std::to_string(memory_.size()),
                        name_of(dtype),
                        {rows, cols},
                        "",
                        0,
                        rows * cols * dtype_bytes(dtype)});
    if (dtype == Dtype::kF8E4M3) {
      weight.block_rows = weight.block_cols = kScaleBlock;
      const int64_t scale_rows = (rows + kScaleBlock - 1) / kScaleBlock;
      const int64_t scale_cols = (cols + kScaleBlock - 1) / kScaleBlock;
      weight.scale = static_cast<const float*>(
          fill({"w_scale_inv", "F32", {scale_rows, scale_cols}, "", 0, scale_rows * scale_cols * 4}));
    }
    return weight;
  }
  const float* ones(int64_t size) {
    return static_cast<const float*>(fill({"norm", "F32", {size}, "", 0, size * 4}));
  }

 private:
  const void* fill(const TensorEntry& entry) {
    memory_.push_back(std::make_unique<AnonymousMemory>(entry.bytes));
    fill_synthetic(entry, memory_.back()->data(), 0, entry.bytes);
    return memory_.back()->data();
  }
  std::deque<std::unique_ptr<AnonymousMemory>> memory_;
};

// Counter-based: sums of uniforms, near enough to normals; rounded to bf16, which every device takes exactly.
inline Floats normals(int64_t count, uint64_t seed) {
  Floats values(static_cast<size_t>(count));
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (float& value : values) {
    float sum = -6;
    for (int i = 0; i < 12; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<float>(state >> 40) * 0x1p-24f;
    }
    value = float_of_bf16(bf16_of_float(sum));
  }
  return values;
}

// A matrix in the device's memory.
class DeviceTensor {
 public:
  DeviceTensor(Ops& ops, int64_t rows, int64_t cols, Dtype dtype) : ops_(ops) {
    const int64_t stride = (cols + 15) / 16 * 16;
    bytes_.resize(static_cast<size_t>(rows * stride * dtype_bytes(dtype)));
    tensor_ = {ops.alloc(bytes_.size()), dtype, rows, cols, stride};
    clear();
  }
  ~DeviceTensor() { ops_.free(tensor_.data); }
  DeviceTensor(const DeviceTensor&) = delete;
  DeviceTensor& operator=(const DeviceTensor&) = delete;

  const Tensor& tensor() const { return tensor_; }
  // NaN everywhere: what a call does not write shows in the error.
  void clear() {
    std::fill(bytes_.begin(), bytes_.end(), static_cast<char>(0xff));
    ops_.upload(tensor_.data, bytes_.data(), bytes_.size());
  }
  void set(const Floats& values) {
    for (int64_t row = 0; row < tensor_.rows; ++row) {
      for (int64_t col = 0; col < tensor_.cols; ++col) {
        const float value = values[static_cast<size_t>(row * tensor_.cols + col)];
        char* at = bytes_.data() + (row * tensor_.stride + col) * dtype_bytes(tensor_.dtype);
        if (tensor_.dtype == Dtype::kF32) {
          memcpy(at, &value, 4);
        } else {
          const uint16_t bits = bf16_of_float(value);
          memcpy(at, &bits, 2);
        }
      }
    }
    ops_.upload(tensor_.data, bytes_.data(), bytes_.size());
  }
  Floats rows(const std::vector<int64_t>& wanted) {
    ops_.download(bytes_.data(), tensor_.data, bytes_.size());
    Floats values;
    for (const int64_t row : wanted) {
      const char* at = bytes_.data() + row * tensor_.stride * dtype_bytes(tensor_.dtype);
      for (int64_t col = 0; col < tensor_.cols; ++col)
        values.push_back(element_as_float(at, tensor_.dtype, col));
    }
    return values;
  }

 private:
  Ops& ops_;
  std::vector<char> bytes_;
  Tensor tensor_;
};

}  // namespace rodin
