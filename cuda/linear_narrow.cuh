// linear_narrow: few tokens, bound by the weights' bytes. A block holds 8 warps (16 for KW = 16): teams of KW
// warps share MT * 16 rows (gated: 16 of gate and 16 of up) and take every KW-th block of inputs; their sums
// meet in shared memory and are added in order. Grid: (row tiles, token tiles of 8 NT or tiles of a MoePlan,
// batches or pair).
//
// kHalf, for FP8 weights and a tile of at most 8 tokens: the block's inputs become f16 in shared memory
// first, each token's blocks scaled by a power of two so that the largest lies below 2^15, and weights are
// widened to f16, which takes a fifth of the instructions. Products and sums are those of bf16 times that
// power, which is taken out of a block's sum: the same bits, but for inputs 2^-32 below the largest of their
// block.
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
__host__ __device__ constexpr int narrow_shared_bytes() {
  return KW == 1 ? 0 : 2 * narrow_warps(KW) * MT * NT * kSumTile * static_cast<int>(sizeof(float));
}

__host__ __device__ constexpr int half_pitch(int num_blocks) {
  return num_blocks * kBlockK * 2 + 16;
}  // bytes of a token
// Inputs of `tokens` as f16 [tokens, half_pitch] and their powers [tokens, num_blocks].
__host__ __device__ constexpr int half_shared_bytes(int tokens, int num_blocks) {
  return tokens * (half_pitch(num_blocks) + num_blocks * static_cast<int>(sizeof(float)));
}

// The block's inputs into shared memory; half a warp takes one block of inputs of one token at a time.
__device__ __forceinline__ void stage_half_inputs(const LinearWork& work, bool is_aligned, int num_blocks,
                                                  char* to, float* inverse) {
  const int cols = work.weight->cols, column = threadIdx.x % 16 * 8;
  const int items = work.count * num_blocks, step = blockDim.x / 16;
  for (int base = threadIdx.x / 32 * 2; base < items; base += step) {
    const int item = base + threadIdx.x / 16 % 2;
    const int token = item / num_blocks, k = item % num_blocks * kBlockK + column;
    uint32_t pairs[4] = {};  // [4]
    if (item < items && k < cols) {
      const bf16* const row = work.x_row(token);
      if (k + 8 <= cols && is_aligned) {
        const uint4 v = *reinterpret_cast<const uint4*>(row + k);
        pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
      } else {
        const uint16_t* const bits = reinterpret_cast<const uint16_t*>(row);
        for (int i = 0; i < 8; ++i)
          if (k + i < cols) pairs[i / 2] |= static_cast<uint32_t>(bits[k + i]) << (i % 2 * 16);
      }
    }
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) most = max(most, larger_magnitude(pairs[i]));
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, offset));
    const HalfPower power(most);
    uint32_t halves[4];  // [4]
#pragma unroll
    for (int i = 0; i < 4; ++i) halves[i] = power.halves(pairs[i]);
    if (item < items) {
      *reinterpret_cast<uint4*>(to + token * half_pitch(num_blocks) + k * 2) =
          make_uint4(halves[0], halves[1], halves[2], halves[3]);
      if (column == 0) inverse[item] = power.inverse;
    }
  }
}

// Asks for the shared expert's weights, which every plan holds, into the second-level cache, a part each
// block.
template <bool kGated>
__device__ __forceinline__ void prefetch_shared(const LinearParams& p) {
  if (threadIdx.x != 0) return;
  const int64_t blocks = static_cast<int64_t>(gridDim.x) * gridDim.y;
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
#pragma unroll
  for (int i = 0; i < (kGated ? 2 : 1); ++i) {
    const WeightView& w = p.table[i][p.num_experts];
    const int64_t bytes = w.rows * w.row_bytes, part = ceil_div(bytes, 128 * blocks) * 128;
    const int64_t begin = block * part;
    if (begin < bytes)
      prefetch_bulk(static_cast<const char*>(w.data) + begin, static_cast<int>(min(part, bytes - begin)));
  }
}

// Waits for the warps of one team.
template <int kThreads>
__device__ __forceinline__ void team_barrier(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kThreads) : "memory");
}

template <class W, int NT, int MT, int KW, bool kGated, bool kHalf>
__global__ void __launch_bounds__(32 * narrow_warps(KW), narrow_blocks(W::kBytes, NT, MT, KW))
    linear_narrow(const __grid_constant__ LinearParams p) {
  static_assert(!kGated || MT == 2);
  static_assert(!kHalf || (W::kBytes == 1 && NT == 1));
  constexpr int kNarrowWarps = narrow_warps(KW);
  constexpr int kGroups = kNarrowWarps / KW;  // warps or teams of warps with rows of their own
  constexpr int kGroupRows = kGated ? 16 : 16 * MT;
  extern __shared__ __align__(
      16) float sums[];  // [2, kNarrowWarps, MT, NT, kSumTile], then half_shared_bytes

  let_successor_begin();
  const bool is_grouped = p.table[0] != nullptr;
  if (is_grouped && p.has_shared) prefetch_shared<kGated>(p);
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

  char* const half_inputs =
      reinterpret_cast<char*>(sums + narrow_shared_bytes<NT, MT, KW>() / static_cast<int>(sizeof(float)));
  float* const inverse = reinterpret_cast<float*>(half_inputs + work.count * half_pitch(num_blocks));
  // The power of two of a token's block that its sum has too many.
  const auto inverse_of = [&](int token, int block) {
    if constexpr (!kHalf) return 1.0f;
    return token < work.count && block < num_blocks ? inverse[token * num_blocks + block] : 0.0f;
  };

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
  constexpr bool kPrefetchInputs = !kHalf && kPrefetch && NT == 1 && (MT == 2) == (KW > 1);
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
    } else if constexpr (kHalf) {
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const bool is_there = 8 * nt + g < work.count && block < num_blocks;
        const uint4* const at = reinterpret_cast<const uint4*>(
            half_inputs + (8 * nt + g) * half_pitch(num_blocks) + (block * kBlockK + 16 * t) * 2);
#pragma unroll
        for (int kh = 0; kh < 2; ++kh)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint4 v = is_there ? at[8 * kh + i] : make_uint4(0, 0, 0, 0);
            x[kh][nt][4 * i] = v.x, x[kh][nt][4 * i + 1] = v.y;
            x[kh][nt][4 * i + 2] = v.z, x[kh][nt][4 * i + 3] = v.w;
          }
      }
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
            if constexpr (kHalf) {
              W::half_pairs(now[mt][0][kh], step, a[0], a[2]);
              W::half_pairs(now[mt][1][kh], step, a[1], a[3]);
#pragma unroll
              for (int nt = 0; nt < NT; ++nt)
                mma_half(acc[mt][nt], a, x[kh][nt][2 * step], x[kh][nt][2 * step + 1]);
              continue;
            }
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
  if constexpr (kHalf) {
    stage_half_inputs(work, p.is_x_aligned, num_blocks, half_inputs, inverse);
    __syncthreads();
  }
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
      float powers[NT][2];  // [NT, 2]
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) powers[nt][odd] = inverse_of(8 * nt + 2 * t + odd, block);
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float sum = acc[mt][nt][c];
            if constexpr (kHalf) sum *= powers[nt][c % 2];
            total[mt][nt][c] = add_block<W>(total[mt][nt][c], sum, scale[mt][c / 2]);
          }
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
          for (int mt = 0; mt < MT; ++mt) {
            float sum = at[(w * MT + mt) * NT * kSumTile];
            if constexpr (kHalf) sum *= inverse_of(token, base + w);
            total[i][mt] = add_block<W>(total[i][mt], sum, scale[w][mt]);
          }
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
