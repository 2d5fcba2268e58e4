// linear_wide: many tokens. A block of 4 warps, 32 weight rows each (gated: 16 of gate and 16 of up), takes 64
// tokens whose inputs pass through a ring of shared memory stages; weights go straight from global memory to
// registers, one half block ahead. Grid: (row tiles, token tiles of 64 or tiles of a MoePlan, batches or pair).
#pragma once

#include "cuda/linear_tile.cuh"

namespace rodin::cuda {

constexpr int kWideTokens = 64;
constexpr int kWideThreads = 128;
constexpr int kWideStages = 3;
constexpr int kWidePitch = kBlockK + 8;  // bf16 from one token to the next in a stage
constexpr int kWideSharedBytes = kWideStages * kWideTokens * kWidePitch * static_cast<int>(sizeof(bf16));

template <class W, bool kGated>
__global__ void __launch_bounds__(kWideThreads) linear_wide(const __grid_constant__ LinearParams p) {
  constexpr int NT = kWideTokens / 8;
  constexpr int kWarpRows = kGated ? 16 : 32;
  extern __shared__ __align__(16) char shared[];
  bf16* stages = reinterpret_cast<bf16*>(shared);  // [kWideStages, kWideTokens, kWidePitch]

  LinearWork work;
  if (!find_work(p, kWideTokens, work)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  if (static_cast<int>(blockIdx.x) * 4 * kWarpRows >= work.rows) return;
  const int row0 = (blockIdx.x * 4 + warp) * kWarpRows;
  const int cols = work.weight->cols;
  const int num_blocks = (cols + kBlockK - 1) / kBlockK;

  const char* rows[2][2];  // [m tile, row half]
  const float* scales[2][2] = {};  // [m tile, row half]
#pragma unroll
  for (int mt = 0; mt < 2; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const WeightView& w = kGated && mt == 1 ? *work.up : *work.weight;
      const int row = row0 + (kGated ? 0 : 16 * mt) + g + 8 * half;
      rows[mt][half] = weight_row(w, work.row_offset, row, work.rows);
      if constexpr (W::kHasScale) scales[mt][half] = scale_row(w, work.row_offset, row, work.rows);
    }

  // Each thread brings half a token's block: 8 words of 16 bytes.
  const int stage_token = threadIdx.x / 2;
  const int stage_k = threadIdx.x % 2 * (kBlockK / 2);
  const bf16* stage_row = work.x_row(stage_token);
  const auto bring = [&](int block) {
    if (block < num_blocks) {
      bf16* to = stages + ((block % kWideStages) * kWideTokens + stage_token) * kWidePitch + stage_k;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int k = block * kBlockK + stage_k + 8 * i;
        if (stage_row == nullptr || k >= cols) {
          *reinterpret_cast<uint4*>(to + 8 * i) = make_uint4(0, 0, 0, 0);
        } else if (p.is_x_aligned && k + 8 <= cols) {
          copy_async_16(shared_address(to + 8 * i), stage_row + k, true);
        } else {
          for (int j = 0; j < 8; ++j) to[8 * i + j] = k + j < cols ? stage_row[k + j] : __float2bfloat16_rn(0.0f);
        }
      }
    }
    copy_async_commit();
  };

  typename W::Fragment next[2][2];  // [m tile, row half]
  const auto load = [&](int half_block) {
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_fragment<W>(next[mt][half], rows[mt][half], half_block * 64 + 16 * t, cols);
  };

  float total[2][NT][4] = {};  // [m tile, token tile, 4]
  bring(0);
  bring(1);
  load(0);
  for (int block = 0; block < num_blocks; ++block) {
    copy_async_wait<1>();
    __syncthreads();  // the stage is complete, and everybody is done with the one that is overwritten next
    bring(block + 2);
    float acc[2][NT][4];
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[mt][nt][c] = 0;
    const bf16* stage = stages + ((block % kWideStages) * kWideTokens + g) * kWidePitch + 16 * t;
#pragma unroll
    for (int kh = 0; kh < 2; ++kh) {
      typename W::Fragment now[2][2];
#pragma unroll
      for (int mt = 0; mt < 2; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half) now[mt][half] = next[mt][half];
      load(2 * block + kh + 1);
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
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const uint4 x =
              *reinterpret_cast<const uint4*>(stage + nt * 8 * kWidePitch + 64 * kh + 8 * pair);
#pragma unroll
          for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
            for (int part = 0; part < W::kParts; ++part) mma(acc[mt][nt], a[mt][0][part], x.x, x.y);
#pragma unroll
            for (int part = 0; part < W::kParts; ++part) mma(acc[mt][nt], a[mt][1][part], x.z, x.w);
          }
        }
      }
    }
    const int scale_index = block / work.weight->blocks_per_scale;
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          total[mt][nt][c] = add_block<W>(total[mt][nt][c], acc[mt][nt][c], scales[mt][c / 2], scale_index);
  }

#pragma unroll
  for (int nt = 0; nt < NT; ++nt)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int token = 8 * nt + 2 * t + c % 2;
      const int row = row0 + g + 8 * (c / 2);
      store_output<kGated>(p, work, token, row, total[0][nt][c], total[1][nt][c]);
      if constexpr (!kGated) store_output<kGated>(p, work, token, row + 16, total[1][nt][c], 0.0f);
    }
}

}  // namespace rodin::cuda
