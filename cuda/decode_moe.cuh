// What decode_experts.cu and decode_down.cu share: products of one token on the tensor cores, rows brought by
// bulk copies.
#pragma once

#include "cuda/decode_moe.h"
#include "cuda/hopper_narrow.cuh"
#include "cuda/linear_tile.cuh"

namespace rodin::cuda {

// Weights of one token are read once: they must not drive what every layer reads, the kernels' code among it,
// out of the second-level cache.
__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// copy_bulk of such memory.
__device__ __forceinline__ void copy_once(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// The power of two that brings the largest of bf16 magnitudes `most` (their bits) below 2^15, and its
// inverse.
struct HalfPower {
  float power, inverse;
  __device__ __forceinline__ explicit HalfPower(uint32_t most) {
    const uint32_t exponent = max(most >> 7, 15u);
    power = __uint_as_float((268 - exponent) << 23);
    inverse = __uint_as_float((exponent - 14) << 23);
  }
  __device__ __forceinline__ uint32_t halves(uint32_t pair) const {
    const __half2 value = __floats2half2_rn(low_float(pair) * power, high_float(pair) * power);
    return *reinterpret_cast<const uint32_t*>(&value);
  }
};

__device__ __forceinline__ uint32_t most_magnitude(const uint4& v) {
  const auto most = [](uint32_t pair) { return max(pair & 0x7fffu, pair >> 16 & 0x7fffu); };
  return max(max(most(v.x), most(v.y)), max(most(v.z), most(v.w)));
}

// acc += the products of 16 bytes of a row for the tile's upper half, 16 for its lower half, and 16 inputs.
__device__ __forceinline__ void multiply_halves(float (&acc)[4], const uint4& upper, const uint4& lower,
                                                const uint32_t (&x)[8]) {
  const uint32_t a[4] = {upper.x, upper.y, upper.z, upper.w}, b[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint32_t tile[4] = {half_of_e4m3(a[step] & 0xffffu), half_of_e4m3(b[step] & 0xffffu),
                              half_of_e4m3(a[step] >> 16), half_of_e4m3(b[step] >> 16)};
    mma_half(acc, tile, x[2 * step], x[2 * step + 1]);
  }
}

}  // namespace rodin::cuda
