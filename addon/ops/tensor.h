// Non-owning views of memory on a device. Shapes use the letters of the comments everywhere:
// T tokens, S sequences, H hidden_size, V vocab_size, A attention heads, E routed experts, k experts a token.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rodin {

enum class Dtype : uint8_t { kF32, kF16, kBF16, kF8E4M3, kI32 };

constexpr int64_t dtype_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
    case Dtype::kI32:
      return 4;
    case Dtype::kF16:
    case Dtype::kBF16:
      return 2;
    case Dtype::kF8E4M3:
      return 1;
  }
  return 0;
}

// A matrix whose rows are contiguous and `stride` elements apart. Whoever made it keeps the memory alive.
struct Tensor {
  void* data = nullptr;
  Dtype dtype = Dtype::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements from one row to the next, >= cols

  template <class T>
  T* row(int64_t i) const {
    return static_cast<T*>(data) + i * stride;
  }
  // Rows first .. first + count - 1.
  Tensor slice_rows(int64_t first, int64_t count) const {
    return {static_cast<char*>(data) + first * stride * dtype_bytes(dtype), dtype, count, cols, stride};
  }
  // Columns first .. first + count - 1 of every row.
  Tensor slice_cols(int64_t first, int64_t count) const {
    return {static_cast<char*>(data) + first * dtype_bytes(dtype), dtype, rows, count, stride};
  }
};

}  // namespace rodin
