// linear_narrow: few tokens, bound by the weights' bytes. A block holds 8 warps (16 for KW = 16): teams of KW
// warps share MT * 16 rows (gated: 16 of gate and 16 of up) and take every KW-th block of inputs; their sums
// meet in shared memory and are added in order. Grid: (row tiles, token tiles of 8 NT or tiles of a MoePlan,
// batches or pair).
#pragma once

#include "cuda/linear_tile.cuh"

namespace rodin::cuda {

constexpr int kTokenPitch = 20;            // floats from one token to the next in a shared sum tile
constexpr int kSumTile = 8 * kTokenPitch;  // floats of a 16 x 8 tile of sums

// Warps of a block: 8, or one team of 16.
__host__ __device__ constexpr int narrow_warps(int team) { return team > 8 ? team : 8; }

// Blocks that should fit on a multiprocessor: as many loads in flight as the registers allow without
// spilling.
__host__ __device__ constexpr int narrow_blocks(int bytes, int NT, int MT, int KW) {
  if (bytes == 4 || NT * MT > 4) return 1;
  if (bytes == 2) return NT * MT > 2 || MT == 2 || KW == 16 ? 1 : 2;
  if (KW == 16) return NT == 1 ? 2 : 1;
  if (NT * MT == 4) return KW == 1 ? 1 : 2;
  if (NT * MT == 2) return KW == 1 || MT == 2 ? 2 : 3;
  return KW == 1 ? 3 : 4;
}

template <int NT, int MT, int KW>
constexpr int narrow_shared_bytes() {
  return KW == 1 ? 0 : 2 * narrow_warps(KW) * MT * NT * kSumTile * static_cast<int>(sizeof(float));
}

// Waits for the warps of one team.
template <int kThreads>
__device__ __forceinline__ void team_barrier(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kThreads) : "memory");
}

template <class W, int NT, int MT, int KW, bool kGated>
__global__ void __launch_bounds__(32 * narrow_warps(KW), narrow_blocks(W::kBytes, NT, MT, KW))
    linear_narrow(const __grid_constant__ LinearParams p) {
  static_assert(!kGated || MT == 2);
  constexpr int kNarrowWarps = narrow_warps(KW);
  constexpr int kGroups = kNarrowWarps / KW;  // warps or teams of warps with rows of their own
  constexpr int kGroupRows = kGated ? 16 : 16 * MT;
  extern __shared__ float sums[];  // [2, kNarrowWarps, MT, NT, kSumTile]

  let_successor_begin();
  const bool is_grouped = p.table[0] != nullptr;
  if (is_grouped) wait_for_predecessor();  // the plan; elsewhere the first weights are on their way before
  LinearWork work;
  if (!find_work(p, 8 * NT, work)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int group = warp / KW, kw = warp % KW;
  if (static_cast<int>(blockIdx.x) * kGroups * kGroupRows >= work.rows) return;
  const int row0 = (blockIdx.x * kGroups + group) * kGroupRows;
  const int cols = work.weight->cols;
  const int num_blocks = (cols + kBlockK - 1) / kBlockK;
  const int blocks_per_scale = work.weight->blocks_per_scale;

  const char* rows[MT][2];  // [MT, 2]
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const WeightView& w = kGated && mt == 1 ? *work.up : *work.weight;
      rows[mt][half] =
          weight_row(w, work.row_offset, row0 + (kGated ? 0 : 16 * mt) + g + 8 * half, work.rows);
    }
  }
  const bf16* x_rows[NT];  // [NT]
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) x_rows[nt] = work.x_row(8 * nt + g);

  // The next block's weights, on their way while this one is multiplied; the wide dtypes have no registers
  // left.
  constexpr bool kPrefetch = W::kParts == 1;
  typename W::Fragment next[MT][2][2];  // [MT, row half, K half]
  const auto load = [&](int block) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int kh = 0; kh < 2; ++kh)
          load_fragment<W>(next[mt][half][kh], rows[mt][half], block * kBlockK + 64 * kh + 16 * t, cols);
  };
  // The inputs of few tokens come ahead too where there are registers left.
  constexpr bool kPrefetchInputs = kPrefetch && NT == 1 && (MT == 2) == (KW > 1);
  uint32_t next_x[2][NT][8];  // [K half, NT, 8]
  const auto load_x = [&](int block, int kh, uint32_t(&x)[2][NT][8]) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
      load_inputs(x[kh][nt], x_rows[nt], block * kBlockK + 64 * kh + 16 * t, cols, p.is_x_aligned);
  };
  const auto multiply = [&](int block, float(&acc)[MT][NT][4]) {
    if constexpr (!kPrefetch) load(block);
    typename W::Fragment now[MT][2][2];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int kh = 0; kh < 2; ++kh) now[mt][half][kh] = next[mt][half][kh];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[mt][nt][c] = 0;
    uint32_t x[2][NT][8];  // [K half, NT, 8]; with 32 tokens there is room for one half at a time
    if constexpr (kPrefetchInputs) {
#pragma unroll
      for (int kh = 0; kh < 2; ++kh)
#pragma unroll
        for (int i = 0; i < 8; ++i) x[kh][0][i] = next_x[kh][0][i];
      load_x(block + KW, 0, next_x);
      load_x(block + KW, 1, next_x);
    } else {
      load_x(block, 0, x);
      if constexpr (NT < 4) load_x(block, 1, x);
    }
    if constexpr (kPrefetch) load(block + KW);
#pragma unroll
    for (int kh = 0; kh < 2; ++kh) {
      if (NT == 4 && kh == 1) load_x(block, 1, x);
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int part = 0; part < W::kParts; ++part) {
            uint32_t a[4];
            W::pairs(now[mt][0][kh], step, part, a[0], a[2]);
            W::pairs(now[mt][1][kh], step, part, a[1], a[3]);
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) mma(acc[mt][nt], a, x[kh][nt][2 * step], x[kh][nt][2 * step + 1]);
          }
    }
  };

  if constexpr (kPrefetch) load(kw);
  const float* team_scales[MT] = {};  // [MT] KW > 1: a thread's outputs are all of one row
  if constexpr (W::kHasScale && KW > 1) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      const WeightView& w = kGated && mt == 1 ? *work.up : *work.weight;
      team_scales[mt] =
          scale_row(w, work.row_offset, row0 + (kGated ? 0 : 16 * mt) + (kw * 32 + lane) % 16, work.rows);
      if (team_scales[mt] != nullptr) touch(team_scales[mt]);
    }
  }
  if (!is_grouped) wait_for_predecessor();
  if constexpr (kPrefetchInputs) {
    load_x(kw, 0, next_x);
    load_x(kw, 1, next_x);
  }
  if constexpr (KW == 1) {
    const float* scales[MT][2] = {};  // [MT, row half]
    if constexpr (W::kHasScale) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const WeightView& w = kGated && mt == 1 ? *work.up : *work.weight;
          scales[mt][half] =
              scale_row(w, work.row_offset, row0 + (kGated ? 0 : 16 * mt) + g + 8 * half, work.rows);
        }
    }
    float total[MT][NT][4] = {};  // [MT, NT, 4]
    for (int block = 0; block < num_blocks; ++block) {
      float scale[MT][2];  // [MT, row half]
      if constexpr (W::kHasScale) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            scale[mt][half] = scale_at(scales[mt][half], block, blocks_per_scale);
      }
      float acc[MT][NT][4];
      multiply(block, acc);
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
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
#pragma unroll
        for (int mt = 0; mt < (kGated ? 1 : MT); ++mt) {
          store_output<kGated>(p, work, token, row0 + 16 * mt + g + 8 * (c / 2), total[mt][nt][c],
                               total[MT - 1][nt][c]);
        }
      }
  } else {
    constexpr int kTeam = 32 * KW;
    constexpr int kOutputs = (NT * 128 + kTeam - 1) / kTeam;  // 16-row tile elements of each thread
    const int member = kw * 32 + lane;
    float total[kOutputs][MT] = {};  // [kOutputs, MT]
    for (int base = 0, buffer = 0; base < num_blocks; base += KW, buffer ^= 1) {
      float* team = sums + ((buffer * kNarrowWarps + group * KW) * MT * NT) * kSumTile;
      {
        float acc[MT][NT][4];
        multiply(base + kw, acc);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int nt = 0; nt < NT; ++nt) {
            float* tile = team + ((kw * MT + mt) * NT + nt) * kSumTile;
            tile[(2 * t) * kTokenPitch + g] = acc[mt][nt][0];
            tile[(2 * t + 1) * kTokenPitch + g] = acc[mt][nt][1];
            tile[(2 * t) * kTokenPitch + g + 8] = acc[mt][nt][2];
            tile[(2 * t + 1) * kTokenPitch + g + 8] = acc[mt][nt][3];
          }
      }
      float scale[KW][MT];  // [KW, MT]
#pragma unroll
      for (int w = 0; w < KW; ++w)
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          if constexpr (W::kHasScale) {
            scale[w][mt] =
                base + w < num_blocks ? scale_at(team_scales[mt], base + w, blocks_per_scale) : 0.0f;
          } else {
            scale[w][mt] = 1.0f;
          }
        }
      team_barrier<32 * KW>(group);  // also: everybody has read what the next round overwrites
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        const int o = member + i * kTeam;
        if (kOutputs * kTeam != NT * 128 && o >= NT * 128) break;
        const int token = o / 16;
        const float* at = team + (token / 8) * kSumTile + (token % 8) * kTokenPitch + o % 16;
#pragma unroll
        for (int w = 0; w < KW; ++w) {
          if (base + w >= num_blocks) break;
#pragma unroll
          for (int mt = 0; mt < MT; ++mt)
            total[i][mt] = add_block<W>(total[i][mt], at[(w * MT + mt) * NT * kSumTile], scale[w][mt]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int o = member + i * kTeam;
      const int token = o / 16;
      if (o >= NT * 128) continue;
#pragma unroll
      for (int mt = 0; mt < (kGated ? 1 : MT); ++mt) {
        store_output<kGated>(p, work, token, row0 + 16 * mt + o % 16, total[i][mt], total[i][MT - 1]);
      }
    }
  }
}

}  // namespace rodin::cuda
