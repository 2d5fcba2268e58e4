// Values in two parts, both e4m3: v = x * 2^-n with the largest magnitude of 128 in [2^7, 2^8), high =
// e4m3(v), low = e4m3(16 (v - high)). high + low / 16 is v for all that lie within 2^-13 of the largest, and
// v to 2^-22 of the largest below that.
#pragma once

#include "cuda/common.cuh"

namespace rodin::cuda {

// Two e4m3 values of two f16, the first in the low byte.
__device__ __forceinline__ uint32_t e4m3_of_half(__half2 pair) {
  uint16_t out;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(out) : "r"(*reinterpret_cast<const uint32_t*>(&pair)));
  return out;
}

// High and low parts of two values.
__device__ __forceinline__ void split_pair(float a, float b, uint32_t& high, uint32_t& low) {
  const __half2 v = __floats2half2_rn(a, b);
  high = e4m3_of_half(v);
  const uint32_t back = half_of_e4m3(high);
  const __half2 rest = __hsub2(v, *reinterpret_cast<const __half2*>(&back));
  low = e4m3_of_half(__hmul2(rest, __float2half2_rn(16.0f)));
}

// Eight values of a block of 128, of which half a warp has one.
struct EightValues {
  float values[8];

  EightValues() = default;
  __device__ __forceinline__ explicit EightValues(const uint4& pairs)
      : values{low_float(pairs.x), high_float(pairs.x), low_float(pairs.y), high_float(pairs.y),
               low_float(pairs.z), high_float(pairs.z), low_float(pairs.w), high_float(pairs.w)} {}
  // The largest magnitude, a NaN where there is one.
  __device__ __forceinline__ float largest() const {
    float most = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = max_or_nan(most, fabsf(values[i]));
    return most;
  }
};
// That of the block, the same in every lane of the half warp.
__device__ __forceinline__ float largest_of_block(const EightValues& own) {
  float most = own.largest();
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2)
    most = max_or_nan(most, __shfl_xor_sync(kAllLanes, most, offset));
  return most;
}

// The power of two for values of which the largest magnitude is `most`, and what takes it out again: a NaN
// for one that is not finite.
struct SplitPower {
  float power, scale;
  __device__ __forceinline__ explicit SplitPower(float most) {
    const uint32_t exponent = max(__float_as_uint(most) >> 23, 8u);
    power = __uint_as_float((261 - exponent) << 23);
    scale = __uint_as_float(exponent == 255 ? 0x7fffffffu : (exponent - 7) << 23);
  }
};

// The parts of eight values.
__device__ __forceinline__ void split_eight(const float (&values)[8], float power, uint2& high, uint2& low) {
  uint32_t h[4], l[4];  // [4]
#pragma unroll
  for (int i = 0; i < 4; ++i) split_pair(values[2 * i] * power, values[2 * i + 1] * power, h[i], l[i]);
  high = make_uint2(h[0] | h[1] << 16, h[2] | h[3] << 16);
  low = make_uint2(l[0] | l[1] << 16, l[2] | l[3] << 16);
}

}  // namespace rodin::cuda
