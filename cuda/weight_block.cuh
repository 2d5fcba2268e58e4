// FP8 weights of 16 rows and one block of inputs in a warp's registers, and the inputs that meet them.
#pragma once

#include "cuda/linear_tile.cuh"

namespace rodin::cuda {

// Weights of 16 rows and one block of inputs, as a lane feeds them to the tensor cores.
struct WeightBlock {
  WeightF8::Fragment half[2][2];  // [row half, K half]

  __device__ __forceinline__ void load(const WeightView& w, int64_t row_offset, int row0, int rows,
                                       int block) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int kh = 0; kh < 2; ++kh)
        load_fragment<WeightF8>(half[i][kh], weight_row(w, row_offset, row0 + g + 8 * i, rows),
                                block * kBlockK + 64 * kh + 16 * t, w.cols);
  }
  // Asks for what load() will want into the second-level cache.
  static __device__ __forceinline__ void prefetch(const WeightView& w, int row0, int block) {
    const int row = row0 + threadIdx.x % 16, k = block * kBlockK + threadIdx.x % 32 / 16 * 64;
    if (row < w.rows && k < w.cols)
      asm volatile(
          "prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(w.data) + row * w.row_bytes + k));
  }
  // What load() loads by way of shared memory, asynchronously: each thread reads what it has copied. `at`:
  // [4, threads of the block].
  static __device__ __forceinline__ void copy(const WeightView& w, int row0, int block, uint4* at) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int kh = 0; kh < 2; ++kh) {
        const int row = row0 + g + 8 * i, k = block * kBlockK + 64 * kh + 16 * t;
        copy_async_16(shared_address(at + (2 * i + kh) * blockDim.x + threadIdx.x),
                      static_cast<const char*>(w.data) + row * w.row_bytes + k, row < w.rows && k < w.cols);
      }
  }
  __device__ __forceinline__ void read(const uint4* at) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int kh = 0; kh < 2; ++kh) {
        const uint4 v = at[(2 * i + kh) * blockDim.x + threadIdx.x];
        half[i][kh] = {{v.x, v.y, v.z, v.w}};
      }
  }
  __device__ __forceinline__ void multiply(const uint32_t (&x)[2][8], float (&acc)[4]) const {
#pragma unroll
    for (int kh = 0; kh < 2; ++kh)
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t a[4];
        WeightF8::pairs(half[0][kh], step, 0, a[0], a[2]);
        WeightF8::pairs(half[1][kh], step, 0, a[1], a[3]);
        mma(acc, a, x[kh][2 * step], x[kh][2 * step + 1]);
      }
  }
};

// Inputs of token lane / 4 in a block of them.
__device__ __forceinline__ void load_block_inputs(uint32_t (&x)[2][8], const bf16* row, int block, int cols,
                                                  bool is_aligned) {
#pragma unroll
  for (int kh = 0; kh < 2; ++kh)
    load_inputs(x[kh], row, block * kBlockK + 64 * kh + 16 * (threadIdx.x % 4), cols, is_aligned);
}

}  // namespace rodin::cuda
