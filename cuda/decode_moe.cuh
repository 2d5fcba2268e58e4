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

// copy_box of it.
__device__ __forceinline__ void copy_box_once(uint32_t to, const TensorMap* map, int col, int row,
                                              uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// A load of it.
__device__ __forceinline__ uint4 load_once(const void* from, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from), "l"(policy));
  return v;
}

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
