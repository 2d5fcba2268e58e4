// What decode_experts.cu and decode_down.cu share: products of one token on the tensor cores, rows brought by
// bulk copies.
#pragma once

#include "cuda/decode_moe.h"
#include "cuda/hopper_narrow.cuh"
#include "cuda/linear_tile.cuh"
#include "cuda/read_once.cuh"

namespace rodin::cuda {

// d += a b: a [64, 32] of e4m3, of each lane bytes 4 t .. of rows g and g + 8, then bytes 16 + 4 t .. of
// them; b [8, 32] in shared memory. is_added false: d = a b.
__device__ __forceinline__ void wgmma_m64n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], uint64_t b,
                                                    int is_added) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %9, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, 1, "
      "1;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(is_added));
}

}  // namespace rodin::cuda
