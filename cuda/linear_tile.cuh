// Linear layers: out[m][n] = sum_k x[m][k] w[n][k], x bf16, w of any dtype, sums float32. What the kernels
// share: weight fragments, the block's work, the output.
//
// Both kernels (linear_narrow.cuh, linear_wide.cuh) put the weights on the 16-row side of mma.m16n8k16 and
// the tokens on its 8-column side, widen the weights in registers (FP8 to bf16 exactly; F16 and F32 as two
// and three bf16 parts that add up to them), sum each block of kBlockK inputs in the tensor core and add the
// blocks in rising order: total = fma(scale, block sum, total). Hence both give a token the same bits,
// whatever the number of tokens.
//
// K permutation: a lane (g = lane / 4, t = lane % 4) loads the 16 consecutive inputs 16 t .. of each 64 for
// weight rows g and g + 8 and for token g, as whole 16-byte words, and feeds them to four k16 steps. The
// tensor core only needs both operands in the same order.
#pragma once

#include "cuda/common.cuh"

namespace rodin::cuda {

// 16 consecutive weights of one row, and the bf16 pairs (4s, 4s + 1), (4s + 2, 4s + 3) that step s takes.
struct WeightF8 {
  static constexpr int kBytes = 1;
  static constexpr int kParts = 1;
  static constexpr bool kHasScale = true;
  struct Fragment {
    uint32_t words[4];  // [4]
  };
  __device__ static void pairs(const Fragment& f, int step, int, uint32_t& low, uint32_t& high) {
    widen_e4m3_word(f.words[step], low, high);
  }
  __device__ static void half_pairs(const Fragment& f, int step, uint32_t& low, uint32_t& high) {
    low = half_of_e4m3(f.words[step] & 0xffffu);
    high = half_of_e4m3(f.words[step] >> 16);
  }
};

struct WeightBF16 {
  static constexpr int kBytes = 2;
  static constexpr int kParts = 1;
  static constexpr bool kHasScale = false;
  struct Fragment {
    uint32_t words[8];  // [8]
  };
  __device__ static void pairs(const Fragment& f, int step, int, uint32_t& low, uint32_t& high) {
    low = f.words[2 * step];
    high = f.words[2 * step + 1];
  }
};

// Part `part` of the expansion of two floats into bf16 terms, largest first.
__device__ __forceinline__ uint32_t bf16_part(float a, float b, int part) {
  uint32_t pair = pack_bf16(a, b);
  for (int i = 0; i < part; ++i) {
    a -= low_float(pair);
    b -= high_float(pair);
    pair = pack_bf16(a, b);
  }
  return pair;
}

struct WeightF16 {
  static constexpr int kBytes = 2;
  static constexpr int kParts = 2;
  static constexpr bool kHasScale = false;
  struct Fragment {
    uint32_t words[8];  // [8]
  };
  __device__ static void pairs(const Fragment& f, int step, int part, uint32_t& low, uint32_t& high) {
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&f.words[2 * step]));
    const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&f.words[2 * step + 1]));
    low = bf16_part(a.x, a.y, part);
    high = bf16_part(b.x, b.y, part);
  }
};

struct WeightF32 {
  static constexpr int kBytes = 4;
  static constexpr int kParts = 3;
  static constexpr bool kHasScale = false;
  struct Fragment {
    uint32_t words[16];  // [16]
  };
  __device__ static void pairs(const Fragment& f, int step, int part, uint32_t& low, uint32_t& high) {
    const uint32_t* w = f.words + 4 * step;
    low = bf16_part(__uint_as_float(w[0]), __uint_as_float(w[1]), part);
    high = bf16_part(__uint_as_float(w[2]), __uint_as_float(w[3]), part);
  }
};

// The power of two that brings bf16 values of which the largest magnitude has the bits `most` below 2^15, and
// its inverse: what is multiplied as f16.
struct HalfPower {
  float power, inverse;
  __device__ __forceinline__ explicit HalfPower(uint32_t most) {  // magnitudes of bf16 rise with their bits
    const uint32_t exponent = max(most >> 7, 15u);
    power = __uint_as_float((268 - exponent) << 23);
    inverse = __uint_as_float((exponent - 14) << 23);
  }
  __device__ __forceinline__ uint32_t halves(uint32_t pair) const {
    const __half2 value = __floats2half2_rn(low_float(pair) * power, high_float(pair) * power);
    return *reinterpret_cast<const uint32_t*>(&value);
  }
};
__device__ __forceinline__ uint32_t larger_magnitude(uint32_t pair) {
  return max(pair & 0x7fffu, pair >> 16 & 0x7fffu);
}

template <class W>
__device__ __forceinline__ void load_fragment(typename W::Fragment& f, const char* row, int k, int cols) {
  constexpr int kLoads = W::kBytes;  // 16 weights of kBytes in words of 16 bytes
  if (row != nullptr && k < cols) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint4 v = load_streaming(row + static_cast<int64_t>(k) * W::kBytes + 16 * i);
      f.words[4 * i] = v.x;
      f.words[4 * i + 1] = v.y;
      f.words[4 * i + 2] = v.z;
      f.words[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4 * kLoads; ++i) f.words[i] = 0;
  }
}

// Inputs k .. k + 15 of one token as bf16 pairs, zeros behind `cols` and where there is no token.
__device__ __forceinline__ void load_inputs(uint32_t (&x)[8], const bf16* row, int k, int cols,
                                            bool is_aligned) {
  if (row == nullptr || k >= cols) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 0;
    return;
  }
  if (k + 16 <= cols && is_aligned) {
    // Not through the read-only path: the kernel before this one may have written them while this one ran.
    const uint4 a = *reinterpret_cast<const uint4*>(row + k);
    const uint4 b = *(reinterpret_cast<const uint4*>(row + k) + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    return;
  }
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(row);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t low = 0, high = 0;
    if (k + 2 * i < cols) low = bits[k + 2 * i];
    if (k + 2 * i + 1 < cols) high = bits[k + 2 * i + 1];
    x[i] = low | (high << 16);
  }
}

// ---- what a block works on ------------------------------------------------------------------------------

struct LinearWork {
  const WeightView* weight;  // gated: the gate
  const WeightView* up;
  int64_t row_offset;  // of the weight's rows
  int rows;            // from row_offset on
  const bf16* x;
  int64_t x_stride;
  char* out;
  int64_t out_stride;
  const int32_t* order;  // rows of x and out, or null: first, first + 1, ..
  int first;
  int count;
  int x_divisor;

  // The row of x that token i of the tile reads, -1 where there is none.
  __device__ int32_t x_index(int i) const {
    if (i >= count) return -1;
    return (order ? order[first + i] : first + i) / x_divisor;
  }
  __device__ const bf16* x_row(int i) const {
    const int32_t index = x_index(i);
    return index < 0 ? nullptr : x + index * x_stride;
  }
  __device__ int64_t out_row(int i) const { return (order ? order[first + i] : first + i) * out_stride; }
};

// False where this block has nothing to do.
__device__ __forceinline__ bool find_work(const LinearParams& p, int tile_tokens, LinearWork& work) {
  const int z = blockIdx.z;
  int io = 0;
  work.row_offset = 0;
  work.order = nullptr;
  work.x_divisor = 1;
  if (p.table[0] != nullptr) {
    // Read before it is known that it is one, so that the two loads overlap.
    const MoeTile tile = p.plan.tiles[blockIdx.y];
    if (static_cast<int>(blockIdx.y) >= *p.plan.num_tiles) return false;
    io = tile.expert == p.num_experts;
    work.weight = p.table[0] + tile.expert;
    work.up = p.table[1] + tile.expert;
    work.first = tile.first;
    work.count = tile.count;
    if (io == 0) {
      work.order = p.plan.order;
      work.x_divisor = p.x_divisor;
    }
  } else {
    io = p.is_pair ? z : 0;
    work.weight = p.weight + io;
    work.up = p.weight + 1;
    work.first = static_cast<int>(blockIdx.y) * tile_tokens;
    work.count = min(tile_tokens, p.num_tokens - work.first);
  }
  work.rows = work.weight->rows;
  work.x = static_cast<const bf16*>(p.io[io].x);
  work.x_stride = p.io[io].x_stride;
  work.out = static_cast<char*>(p.io[io].out);
  work.out_stride = p.io[io].out_stride;
  if (p.batch_rows != 0) {
    work.row_offset = z * p.weight_batch + p.weight_offset;
    work.rows = p.batch_rows;
    work.x += z * p.x_batch;
    work.out += z * p.out_batch * (p.out_dtype == Dtype::kF32 ? 4 : 2);
  }
  return true;
}

__device__ __forceinline__ const char* weight_row(const WeightView& w, int64_t row_offset, int row,
                                                  int rows) {
  if (row >= rows) return nullptr;
  return static_cast<const char*>(w.data) + (row_offset + row) * w.row_bytes;
}

// Scales of one row; null for a row that does not exist.
__device__ __forceinline__ const float* scale_row(const WeightView& w, int64_t row_offset, int row,
                                                  int rows) {
  if (row >= rows) return nullptr;
  return w.scale + static_cast<int>(row_offset + row) / w.block_rows * w.scale_cols;
}

// The scale of a block of inputs; 0 for a row that does not exist.
__device__ __forceinline__ float scale_at(const float* scales, int block, int blocks_per_scale) {
  if (scales == nullptr) return 0.0f;
  return __ldg(scales + (blocks_per_scale == 1 ? block : block / blocks_per_scale));
}

template <class W>
__device__ __forceinline__ float add_block(float total, float sum, float scale) {
  if constexpr (W::kHasScale) return fmaf(scale, sum, total);
  return total + sum;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// Adds the bias, joins gate and up, and writes one output; nothing for a token or row that does not exist.
template <bool kGated>
__device__ __forceinline__ void store_output(const LinearParams& p, const LinearWork& work, int token,
                                             int row, float value, float up) {
  if (token >= work.count || row >= work.rows) return;
  if (work.weight->bias) value += work.weight->bias[work.row_offset + row];
  if constexpr (kGated) {
    if (work.up->bias) up += work.up->bias[row];
    value = silu(value) * up;
  }
  const int64_t at = work.out_row(token) + row;
  if (p.out_dtype == Dtype::kF32) {
    reinterpret_cast<float*>(work.out)[at] = value;
  } else {
    reinterpret_cast<bf16*>(work.out)[at] = __float2bfloat16_rn(value);
  }
}

}  // namespace rodin::cuda
