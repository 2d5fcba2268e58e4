// What decode_enter.cu and decode_leave.cu share: products of few tokens with matrices whose weights a launch
// of one block a multiprocessor holds in registers, and a barrier of all its blocks.
//
// A tile is 16 rows of weights. Warp w of a tile's block multiplies block w of 128 inputs (as linear_narrow);
// the sums meet in shared memory, where a thread an output adds them in rising order, times their scale: the
// bits of the linear layers' kernels. Weights and scales are asked for before the kernel ahead has ended.
#pragma once

#include "cuda/decode_mla.h"
#include "cuda/weight_block.cuh"

namespace rodin::cuda {

constexpr int kDecodeRowThreads = 32 * kDecodeRowWarps;
constexpr int kRowSumPitch = 20;  // floats from one token to the next: no two lanes of a warp in one bank

__host__ __device__ inline int tiles_of(const WeightView& weight) { return (weight.rows + 15) / 16; }
__host__ __device__ inline int blocks_of(const WeightView& weight) {
  return (weight.cols + kBlockK - 1) / kBlockK;
}

// A warp's sums of one block of inputs to `to` [T, kRowSumPitch].
__device__ __forceinline__ void store_row_sums(const float (&acc)[4], int num_tokens, float* to) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int token = 2 * t + c % 2;
    if (token < num_tokens) to[token * kRowSumPitch + g + 8 * (c / 2)] = acc[c];
  }
}

struct RowScratch {
  float sums[kDecodeRowTiles][kDecodeRowWarps][kMlaFewTokens * kRowSumPitch];
  float scales[kDecodeRowTiles][kDecodeRowWarps];
};

// This block's tiles of the matrices.
struct RowTiles {
  WeightBlock weights[kDecodeRowTiles];  // of this warp's block of inputs

  struct Tile {
    int matrix, row0;
  };
  static __device__ __forceinline__ int count(const DecodeRows& p) {
    const int all = tiles_of(p.weight[0]) + tiles_of(p.weight[1]);
    return (all - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
           static_cast<int>(gridDim.x);
  }
  static __device__ __forceinline__ Tile tile(const DecodeRows& p, int i) {
    const int index = blockIdx.x + i * gridDim.x, first = tiles_of(p.weight[0]);
    return index < first ? Tile{0, index * 16} : Tile{1, (index - first) * 16};
  }

  __device__ __forceinline__ void ask(const DecodeRows& p, RowScratch& scratch) {
    const int warp = threadIdx.x / 32, num_tiles = count(p);
#pragma unroll
    for (int i = 0; i < kDecodeRowTiles; ++i) {
      if (i >= num_tiles) break;
      const Tile at = tile(p, i);
      const WeightView& weight = p.weight[at.matrix];
      weights[i].load(weight, 0, at.row0, weight.rows, warp);
    }
    if (threadIdx.x < kDecodeRowTiles * kDecodeRowWarps) {
      const int i = threadIdx.x / kDecodeRowWarps, block = threadIdx.x % kDecodeRowWarps;
      if (i < num_tiles) {
        const Tile at = tile(p, i);
        const WeightView& weight = p.weight[at.matrix];
        if (block < blocks_of(weight))
          scratch.scales[i][block] =
              scale_at(scale_row(weight, 0, at.row0, weight.rows), block, weight.blocks_per_scale);
      }
    }
  }

  // All threads of the block; the outputs are written when it returns, but not seen by other blocks yet.
  __device__ __forceinline__ void run(const DecodeRows& p, int num_tokens, RowScratch& scratch) const {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, num_tiles = count(p);
    const int num_blocks = blocks_of(p.weight[0]);
    if (num_tiles > 0 && warp < num_blocks) {
      uint32_t x[2][8];  // [K half, 8]
      const bf16* row = static_cast<const bf16*>(p.io[0].x) + g * p.io[0].x_stride;
      load_block_inputs(x, g < num_tokens ? row : nullptr, warp, p.weight[0].cols, true);
#pragma unroll
      for (int i = 0; i < kDecodeRowTiles; ++i) {
        if (i >= num_tiles) break;
        float acc[4] = {};
        weights[i].multiply(x, acc);
        store_row_sums(acc, num_tokens, scratch.sums[i][warp]);
      }
    }
    __syncthreads();
    for (int o = threadIdx.x; o < num_tiles * num_tokens * 16; o += kDecodeRowThreads) {
      const int i = o / (16 * num_tokens), token = o / 16 % num_tokens, row = o % 16;
      const Tile at = tile(p, i);
      float total = 0;
#pragma unroll 8
      for (int block = 0; block < num_blocks; ++block)
        total = add_block<WeightF8>(total, scratch.sums[i][block][token * kRowSumPitch + row],
                                    scratch.scales[i][block]);
      if (at.row0 + row < p.weight[at.matrix].rows) {
        const LinearIo& io = p.io[at.matrix];
        static_cast<bf16*>(io.out)[token * io.out_stride + at.row0 + row] = __float2bfloat16_rn(total);
      }
    }
  }
};

// Whether RowTiles takes the matrices in `num_blocks` blocks.
inline bool is_decode_rows(const DecodeRows& p, int num_blocks) {
  for (const WeightView& weight : p.weight) {
    if (weight.rows == 0) continue;
    if (weight.dtype != Dtype::kF8E4M3 || weight.bias != nullptr || weight.block_rows % 16 != 0 ||
        weight.cols % 16 != 0 || weight.cols != p.weight[0].cols)
      return false;
  }
  return p.weight[0].rows > 0 && blocks_of(p.weight[0]) <= kDecodeRowWarps &&
         tiles_of(p.weight[0]) + tiles_of(p.weight[1]) <= kDecodeRowTiles * num_blocks &&
         reinterpret_cast<uintptr_t>(p.io[0].x) % 16 == 0 && p.io[0].x_stride % 8 == 0;
}

// ---- the barrier ----------------------------------------------------------------------------------------

// What a block adds to the count: together kArrivalsEach.
__device__ __forceinline__ uint64_t own_arrivals() {
  return blockIdx.x == 0 ? kArrivalsEach - gridDim.x + 1 : 1;
}

// Holds all blocks of a launch until each has arrived; what any of them wrote before is seen by all behind
// it.
//
// Blocks wait for each other here, so all must become resident. They do: a launch's blocks begin only when
// those of all launches ahead have begun (each lets its successor begin first of all, or ends), which wait
// for nothing that is not resident, and so end; then there is a multiprocessor for every block.
struct GridBarrier {
  uint64_t* arrivals;
  uint64_t before;

  // Behind wait_for_predecessor(): the launches ahead have counted all they do, and this block has not, so
  // that the count is on its way to the next multiple.
  __device__ __forceinline__ explicit GridBarrier(uint64_t* count) : arrivals(count) {
    if (threadIdx.x == 0)
      asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(before) : "l"(arrivals) : "memory");
  }
  // Once a launch.
  __device__ __forceinline__ void wait() const {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(arrivals), "l"(own_arrivals())
                   : "memory");
      const uint64_t target = (before / kArrivalsEach + 1) * kArrivalsEach;
      uint64_t now;
      do {
        asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(now) : "l"(arrivals) : "memory");
      } while (now < target);
    }
    __syncthreads();
  }
};

}  // namespace rodin::cuda
