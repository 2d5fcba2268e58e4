// linear_wide: many tokens. A block of 4 warps, 32 weight rows each (gated: 16 of gate and 16 of up), takes
// 64 tokens. Weights, as they are stored, and inputs pass through a ring of shared memory stages, one block
// of inputs each, filled by asynchronous copies; every warp widens its own rows. Grid: (row tiles, token
// tiles of 64 or tiles of a MoePlan, batches or pair).
#pragma once

#include "cuda/linear_tile.cuh"

namespace rodin::cuda {

constexpr int kWideTokens = 64;
constexpr int kWideThreads = 128;
constexpr int kWideRows = 128;           // weight rows of a block, gate and up together
constexpr int kWidePitch = kBlockK + 8;  // bf16 from one token to the next in a stage

template <class W>
struct WideStages {
  static constexpr int kCount = W::kBytes == 1 ? 3 : 2;
  static constexpr int kWeightBytes = kWideRows * kBlockK * W::kBytes;
  static constexpr int kInputBytes = kWideTokens * kWidePitch * static_cast<int>(sizeof(bf16));
  static constexpr int kBytes = kCount * (kWeightBytes + kInputBytes);
};

// 16-byte word `word` of row `row` of a weight stage. Odd rows are moved so that the 8 lanes of a quarter
// warp (two rows, four words) read different banks.
template <class W>
__device__ __forceinline__ int wide_word(int row, int word) {
  constexpr int kWords = 8 * W::kBytes;
  constexpr int kMove = W::kBytes == 1 ? 4 : 1;
  return row * kWords + (word ^ (row % 2 * kMove));
}

template <class W, bool kGated>
__global__ void __launch_bounds__(kWideThreads) linear_wide(const __grid_constant__ LinearParams p) {
  using Stages = WideStages<W>;
  constexpr int NT = kWideTokens / 8;
  constexpr int kWarpRows = kGated ? 16 : 32;  // outputs of a warp
  constexpr int kWords = 8 * W::kBytes;        // 16-byte words of a row in a stage
  extern __shared__ __align__(128) char shared[];
  char* weight_stages = shared;  // [kCount, kWideRows, kBlockK]
  bf16* input_stages = reinterpret_cast<bf16*>(shared + Stages::kCount * Stages::kWeightBytes);
  // input_stages: [kCount, kWideTokens, kWidePitch]

  let_successor_begin();
  wait_for_predecessor();
  LinearWork work;
  if (!find_work(p, kWideTokens, work)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int block_row0 = blockIdx.x * 4 * kWarpRows;
  if (block_row0 >= work.rows) return;
  const int cols = work.weight->cols;
  const int num_blocks = (cols + kBlockK - 1) / kBlockK;
  const int blocks_per_scale = work.weight->blocks_per_scale;

  // Row i of a weight stage: warp i / 32, its m tile i / 16 % 2 (gated: gate, up), row i % 16 of the tile.
  const auto weight_of = [&](int tile) -> const WeightView& {
    return kGated && tile == 1 ? *work.up : *work.weight;
  };
  const auto row_of = [&](int i) { return block_row0 + (kGated ? i / 32 * 16 + i % 16 : i); };
  // Rows of x of the tile's tokens, -1 where there is none.
  __shared__ int32_t x_rows[kWideTokens];  // [kWideTokens]
  if (threadIdx.x < kWideTokens) x_rows[threadIdx.x] = work.x_index(threadIdx.x);
  __syncthreads();
  const int padded_cols = (cols + 15) / 16 * 16;

  // Neighbouring threads take neighbouring words of one row, of weights and of inputs.
  const auto bring = [&](int block) {
    if (block < num_blocks) {
      const int stage = block % Stages::kCount;
      char* weights = weight_stages + stage * Stages::kWeightBytes;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int at = i * kWideThreads + threadIdx.x;
        const int row = at / kWords, word = at % kWords;
        const int k = block * kBlockK + word * (16 / W::kBytes);
        const char* from = weight_row(weight_of(row / 16 % 2), work.row_offset, row_of(row), work.rows);
        const bool is_there = from != nullptr && k < padded_cols;
        copy_async_16(shared_address(weights + wide_word<W>(row, word) * 16),
                      is_there ? from + static_cast<int64_t>(k) * W::kBytes
                               : static_cast<const char*>(work.weight->data),
                      is_there);
      }
      bf16* inputs = input_stages + stage * kWideTokens * kWidePitch;
#pragma unroll
      for (int i = 0; i < kWideTokens * kBlockK / 8 / kWideThreads; ++i) {
        const int at = i * kWideThreads + threadIdx.x;
        const int token = at / (kBlockK / 8), offset = at % (kBlockK / 8) * 8;
        const int k = block * kBlockK + offset;
        const int x_row = x_rows[token];
        const bf16* from = work.x + x_row * work.x_stride + k;
        bf16* to = inputs + token * kWidePitch + offset;
        if (x_row < 0 || k >= cols) {
          *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
        } else if (p.is_x_aligned && k + 8 <= cols) {
          copy_async_16(shared_address(to), from, true);
        } else {
          for (int j = 0; j < 8; ++j) to[j] = k + j < cols ? from[j] : __float2bfloat16_rn(0.0f);
        }
      }
    }
    copy_async_commit();
  };

  const float* scales[2][2] = {};  // [m tile, row half]
  if constexpr (W::kHasScale) {
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[mt][half] =
            scale_row(weight_of(mt), work.row_offset, row_of(32 * warp + 16 * mt + g + 8 * half), work.rows);
      }
  }

  float total[2][NT][4] = {};  // [m tile, token tile, 4]
#pragma unroll
  for (int i = 0; i < Stages::kCount - 1; ++i) bring(i);
  for (int block = 0; block < num_blocks; ++block) {
    copy_async_wait<Stages::kCount - 2>();
    __syncthreads();  // the stage is complete, and everybody is done with the one that is overwritten next
    bring(block + Stages::kCount - 1);
    float scale[2][2];  // [m tile, row half]
    if constexpr (W::kHasScale) {
#pragma unroll
      for (int mt = 0; mt < 2; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          scale[mt][half] = scale_at(scales[mt][half], block, blocks_per_scale);
    }
    float acc[2][NT][4];
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[mt][nt][c] = 0;
    const int stage = block % Stages::kCount;
    const char* weights = weight_stages + stage * Stages::kWeightBytes;
    const bf16* inputs = input_stages + (stage * kWideTokens + g) * kWidePitch + 16 * t;
#pragma unroll
    for (int kh = 0; kh < 2; ++kh) {
      typename W::Fragment now[2][2];  // [m tile, row half]
#pragma unroll
      for (int mt = 0; mt < 2; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < W::kBytes; ++i) {
            const int row = 32 * warp + 16 * mt + g + 8 * half;
            const uint4 v = *reinterpret_cast<const uint4*>(
                weights + wide_word<W>(row, (4 * kh + t) * W::kBytes + i) * 16);
            uint32_t* words = now[mt][half].words + 4 * i;
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
          }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {  // steps 2 pair and 2 pair + 1
        uint32_t a[2][2][W::kParts][4];       // [m tile, step, part, 4]
#pragma unroll
        for (int mt = 0; mt < 2; ++mt)
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int part = 0; part < W::kParts; ++part) {
              W::pairs(now[mt][0], 2 * pair + s, part, a[mt][s][part][0], a[mt][s][part][2]);
              W::pairs(now[mt][1], 2 * pair + s, part, a[mt][s][part][1], a[mt][s][part][3]);
            }
            // Four token tiles at a time: eight independent products between two of one sum.
#pragma unroll
        for (int base = 0; base < NT; base += 4) {
          uint4 x[4];  // [4]
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            x[i] = *reinterpret_cast<const uint4*>(inputs + (base + i) * 8 * kWidePitch + 64 * kh + 8 * pair);
          }
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int part = 0; part < W::kParts; ++part)
#pragma unroll
              for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int mt = 0; mt < 2; ++mt)
                  mma(acc[mt][base + i], a[mt][s][part], s == 0 ? x[i].x : x[i].z, s == 0 ? x[i].y : x[i].w);
        }
      }
    }
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          total[mt][nt][c] = add_block<W>(total[mt][nt][c], acc[mt][nt][c], scale[mt][c / 2]);
  }

#pragma unroll
  for (int nt = 0; nt < NT; ++nt)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int token = 8 * nt + 2 * t + c % 2;
      const int row = row_of(32 * warp) + g + 8 * (c / 2);
      store_output<kGated>(p, work, token, row, total[0][nt][c], total[1][nt][c]);
      if constexpr (!kGated) store_output<kGated>(p, work, token, row + 16, total[1][nt][c], 0.0f);
    }
}

}  // namespace rodin::cuda
