// Keys of an FP8 cache on their way into the ring of mla_wgmma.cu: from raw rows to boxes of bf16.
#pragma once

#include "cuda/mla_wgmma.cuh"

namespace rodin::cuda {

// Sixteen e4m3 latents times their scale, in bf16.
__device__ __forceinline__ void widen_scaled(const uint4& packed, float scale, uint4 (&wide)[2]) {
  // Two terms of the scale, cut off: the product is rounded once but for 2^-16 of it.
  const uint32_t high_bits = __float_as_uint(scale);
  const float rest = scale - __uint_as_float(high_bits & 0xffff0000u);
  const uint32_t high_pair = __byte_perm(high_bits, 0, 0x3232);
  const uint32_t low_pair = __byte_perm(__float_as_uint(rest), 0, 0x3232);
  const uint32_t raw[4] = {packed.x, packed.y, packed.z, packed.w};
  uint32_t out[8];  // [8] pairs
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t pair[2];
    widen_e4m3_word(raw[j], pair[0], pair[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t low;
      asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(low) : "r"(pair[i]), "r"(low_pair));
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[2 * j + i]) : "r"(pair[i]), "r"(high_pair), "r"(low));
    }
  }
  wide[0] = make_uint4(out[0], out[1], out[2], out[3]);
  wide[1] = make_uint4(out[4], out[5], out[6], out[7]);
}

// kWidenWarps warps: raw rows to boxes of the ring, zeros for keys that nobody attends to. A warp has 8 rows, a
// lane one of them and 16 latents of a box, so that 8 lanes' words lie in different banks.
template <int N>
__device__ __forceinline__ void widen_keys(const MlaWgmmaParams& p, const MlaLayout<N, true>& at) {
  using L = MlaLayout<N, true>;
  static_assert(kWidenWarps * 8 == kKeys && kFp8Group % kMlaBoxColumns == 0);
  const int lane = threadIdx.x % 32, part = lane / 8;
  const int row = threadIdx.x / 32 % kWidenWarps * 8 + lane % 8;
  const auto row_bytes = static_cast<int>(p.mla.cache_stride);
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  MlaItems items(p.mla);
  MlaItem item;
  Ring<L::kRawStages> raw_ring;
  Ring<L::kSlots> ring;
  while (items.take(item)) {
    for (int first = item.begin; first < item.end; first += kKeys) {
      const bool is_there = first + row >= p.mla.first_position && first + row < item.end;
      barrier_wait(at.raw_full(raw_ring.place), raw_ring.parity);
      const uint32_t from = at.raw(raw_ring.place) + row * row_bytes;
#pragma unroll
      for (int third = 0; third < kThirds; ++third) {
        uint4 raw[kThirdBoxes + 1];
        float scale[kThirdBoxes];
#pragma unroll
        for (int i = 0; i < kThirdBoxes; ++i) {
          const int box = third * kThirdBoxes + i;
          if (box < kBoxes - 1) {
            raw[i] = load_shared(from + box * kMlaBoxColumns + part * 16);
            scale[i] = load_shared_float(from + kMlaMaxLora + box * kMlaBoxColumns / kFp8Group * 4);
            if (!is_there) raw[i] = zeros, scale[i] = 0;
          } else {  // the rotary part, which is in bf16
            const uint32_t rope = from + kMlaMaxLora + kMlaMaxLora / kFp8Group * 4;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int word = part + 4 * j;
              raw[i + j] = is_there && word * 8 < p.mla.rope_dim ? load_shared(rope + word * 16) : zeros;
            }
          }
        }
        barrier_wait(at.empty(ring.place), ring.parity ^ 1);
        const uint32_t to = at.slot(ring.place) + row * 128;
#pragma unroll
        for (int i = 0; i < kThirdBoxes; ++i) {
          if (third * kThirdBoxes + i < kBoxes - 1) {
            uint4 wide[2];
            widen_scaled(raw[i], scale[i], wide);
#pragma unroll
            for (int j = 0; j < 2; ++j)
              store_shared(to + i * kBoxBytes + ((2 * part + j) ^ (row & 7)) * 16, wide[j]);
          } else {
#pragma unroll
            for (int j = 0; j < 2; ++j)
              store_shared(to + i * kBoxBytes + ((part + 4 * j) ^ (row & 7)) * 16, raw[i + j]);
          }
        }
        shared_fence();
        __syncwarp();
        if (lane == 0) barrier_arrive(at.full(ring.place));
        ring.next();
      }
      if (lane == 0) barrier_arrive(at.raw_empty(raw_ring.place));
      raw_ring.next();
    }
  }
}

}  // namespace rodin::cuda
