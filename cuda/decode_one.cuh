// What decode_enter_one.cu and decode_leave_one.cu share: one token's products, and words that say themselves
// whether they are there.
//
// A block's warps hold 16 rows of weights, warp w block w of 128 inputs, of which each lane brings four. FP8
// is widened to f16 and inputs are f16 times a power of two, as linear_narrow's (kHalf), with its bits.
//
// What blocks of a launch give each other are pairs of bf16 with the launch's number beside them in one
// 64-bit word: a reader polls the data itself, where a barrier would take a fence, a count, a poll and the
// load. The number comes from the count of blocks that decode_rows.cuh's barrier keeps.
#pragma once

#include "cuda/decode_mla.h"
#include "cuda/decode_rows.cuh"

namespace rodin::cuda {

// ---- words ----------------------------------------------------------------------------------------------

// The number of this launch, for every thread that asks before its block has called count_block(). Behind
// wait_for_predecessor(); blocks wait for each other, so all must become resident (GridBarrier).
__device__ __forceinline__ uint32_t launch_number(const uint64_t* arrivals) {
  uint64_t before;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(before) : "l"(arrivals) : "memory");
  return static_cast<uint32_t>(before / kArrivalsEach) + 1;
}
// By one thread of each block, once.
__device__ __forceinline__ void count_block(uint64_t* arrivals) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(arrivals), "l"(own_arrivals()) : "memory");
}

__device__ __forceinline__ void give_word(uint64_t* to, uint32_t pair, uint32_t launch) {
  const uint64_t word = static_cast<uint64_t>(launch) << 32 | pair;
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}
// Waits for words that `at(i)` points at.
template <int kCount, class At>
__device__ __forceinline__ void await_each(uint32_t (&pairs)[kCount], uint32_t launch, At at) {
  bool is_there;
  do {
    uint64_t words[kCount];  // [kCount] on their way together
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(words[i]) : "l"(at(i)) : "memory");
    is_there = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      is_there = is_there && static_cast<uint32_t>(words[i] >> 32) == launch;
      pairs[i] = static_cast<uint32_t>(words[i]);
    }
  } while (!is_there);
}
// Waits for two words, at a multiple of 16 bytes.
__device__ __forceinline__ uint2 await_words(const uint64_t* from, uint32_t launch) {
  uint64_t a, b;
  do {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
  } while (static_cast<uint32_t>(a >> 32) != launch || static_cast<uint32_t>(b >> 32) != launch);
  return make_uint2(static_cast<uint32_t>(a), static_cast<uint32_t>(b));
}

// ---- products -------------------------------------------------------------------------------------------

// Waits for all that this thread has copied.
__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A block of inputs as f16 in shared memory, written and read by one warp.
struct HalfBlock {
  uint4 words[kBlockK / 8];
};

// Inputs 4 * lane .. + 3 of the block (pairs of bf16) to `to`; returns what the block's sum is to be
// multiplied with.
__device__ __forceinline__ float store_half(uint2 pairs, HalfBlock& to) {
  const uint32_t most = max(larger_magnitude(pairs.x), larger_magnitude(pairs.y));
  const HalfPower power(__reduce_max_sync(kAllLanes, most));
  reinterpret_cast<uint2*>(to.words)[threadIdx.x % 32] =
      make_uint2(power.halves(pairs.x), power.halves(pairs.y));
  return power.inverse;
}

// Sums of rows lane / 4 and lane / 4 + 8, in lanes of lane % 4 == 0.
struct RowPair {
  float low, high;
};

// What a step's product takes of a tile's weights, as f16.
__device__ __forceinline__ void half_operand(const WeightBlock& weights, int kh, int step, uint32_t (&a)[4]) {
#pragma unroll
  for (int row_half = 0; row_half < 2; ++row_half)
    // Both halves of a word in one block, so that no shift is made of the upper one.
    asm("{\n.reg .b16 first, second;\nmov.b32 {first, second}, %2;\ncvt.rn.f16x2.e4m3x2 %0, first;\n"
        "cvt.rn.f16x2.e4m3x2 %1, second;\n}"
        : "=r"(a[row_half]), "=r"(a[row_half + 2])
        : "r"(weights.half[row_half][kh].words[step]));
}

// Weights of a tile and block, widened ahead.
struct HalfWeights {
  uint32_t pairs[2][4][4];  // [K half, step, 4]

  __device__ __forceinline__ void widen(const WeightBlock& from) {
#pragma unroll
    for (int kh = 0; kh < 2; ++kh)
#pragma unroll
      for (int step = 0; step < 4; ++step) half_operand(from, kh, step, pairs[kh][step]);
  }
};
__device__ __forceinline__ void half_operand(const HalfWeights& weights, int kh, int step, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = weights.pairs[kh][step][i];
}

// Products of kTiles tiles with a block that this warp (or one that it has waited for) has stored.
template <class Weights, int kTiles>
__device__ __forceinline__ void multiply_half(const Weights (&weights)[kTiles], const HalfBlock& x,
                                              float power, RowPair (&out)[kTiles]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float acc[kTiles][4] = {};
#pragma unroll
  for (int kh = 0; kh < 2; ++kh)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = g == 0 ? x.words[8 * kh + 2 * t + i] : make_uint4(0, 0, 0, 0);  // column 0 alone
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t a[4];
          half_operand(weights[tile], kh, 2 * i + odd, a);
          mma_half(acc[tile], a, odd ? v.z : v.x, odd ? v.w : v.y);
        }
    }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) out[tile] = {acc[tile][0] * power, acc[tile][2] * power};
}

// A tile's sums by block of inputs, and its scales.
struct TileSums {
  static constexpr int kPitch = kDecodeRowWarps + 4;  // 8 rows lie in banks of their own
  float sums[16][kPitch];
  float scales[kDecodeRowWarps];

  __device__ __forceinline__ void store(const RowPair& of, int block) {
    if (threadIdx.x % 4 != 0) return;
    const int g = threadIdx.x % 32 / 4;
    sums[g][block] = of.low, sums[g + 8][block] = of.high;
  }
  __device__ __forceinline__ float total(int row, int num_blocks) const {
    float out = 0;
#pragma unroll
    for (int first = 0; first < kDecodeRowWarps; first += 4) {
      const float4 sum = *reinterpret_cast<const float4*>(&sums[row][first]);
      const float4 scale = *reinterpret_cast<const float4*>(&scales[first]);
      if (first < num_blocks) out = add_block<WeightF8>(out, sum.x, scale.x);
      if (first + 1 < num_blocks) out = add_block<WeightF8>(out, sum.y, scale.y);
      if (first + 2 < num_blocks) out = add_block<WeightF8>(out, sum.z, scale.z);
      if (first + 3 < num_blocks) out = add_block<WeightF8>(out, sum.w, scale.w);
    }
    return out;
  }
};

}  // namespace rodin::cuda
