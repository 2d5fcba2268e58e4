// Four lanes of a warp that hold two columns each of neighbouring column groups of a row, as warpgroup
// products leave them (hopper.cuh), exchange them so that each can write 16 bytes.
#pragma once

#include "cuda/common.cuh"

namespace rodin::cuda {

// w[i] of lane t of four becomes w[t] of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int t) {
  const bool is_odd = t & 1, is_high = t & 2;
  uint32_t a = __shfl_xor_sync(kAllLanes, is_odd ? w[0] : w[1], 1);
  uint32_t b = __shfl_xor_sync(kAllLanes, is_odd ? w[2] : w[3], 1);
  if (is_odd) {
    w[0] = a, w[2] = b;
  } else {
    w[1] = a, w[3] = b;
  }
  a = __shfl_xor_sync(kAllLanes, is_high ? w[0] : w[2], 2);
  b = __shfl_xor_sync(kAllLanes, is_high ? w[1] : w[3], 2);
  if (is_high) {
    w[0] = a, w[1] = b;
  } else {
    w[2] = a, w[3] = b;
  }
}

// Eight neighbouring bf16 of a row from column `col` on, as far as there are columns.
__device__ __forceinline__ void store_words(bf16* row, int col, int cols, const uint32_t (&words)[4]) {
  bf16* to = row + col;
  if (col + 8 <= cols && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (col + i < cols) to[i] = __ushort_as_bfloat16(static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)));
  }
}

}  // namespace rodin::cuda
