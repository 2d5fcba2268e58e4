// Descriptors of matrices for the bulk tensor copies of hopper.cuh, made on the host.
#pragma once

#include <cstdint>

#include "cuda/quantized.h"

namespace rodin::cuda {

enum class Swizzle { kNone, k128Bytes };

// A row-major matrix in device memory and the box that one copy takes of it. What lies outside reads as
// zeros.
struct MatrixShape {
  const void* data = nullptr;  // [rows, cols], 16-byte aligned
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_bytes = 0;  // from one row to the next, a multiple of 16
  int32_t box_rows = 0;   // at most 256
  int32_t box_cols = 0;   // swizzled: 128 bytes
};

// dtype: kF8E4M3, kBF16 or kF32. The driver's function is looked up by name, so that the addon loads without
// one.
TensorMap make_tensor_map(const MatrixShape& shape, Dtype dtype, Swizzle swizzle);

}  // namespace rodin::cuda
