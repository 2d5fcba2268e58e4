// What the kernels share: conversions, tensor core and copy instructions, reductions within a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/kernels.h"

namespace rodin::cuda {

using bf16 = __nv_bfloat16;

constexpr uint32_t kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- conversions ----------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float low_float(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two e4m3 values, in the high bytes of the halves of `pair`, as bf16, exactly (subnormals too): exponent and
// mantissa bits moved into place read as the value * 2^-120. A NaN (0x7f) reads as 480.
__device__ __forceinline__ uint32_t widen_e4m3_pair(uint32_t pair) {
  const uint32_t bits = (pair & 0x80008000u) | ((pair >> 4) & 0x07f007f0u);
  const uint32_t rebias = 0x7b807b80u;  // 2^120 twice
  uint32_t out;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(bits), "r"(rebias));
  return out;
}

// Bytes 0 and 1, bytes 2 and 3 of a word of e4m3 values as bf16.
__device__ __forceinline__ void widen_e4m3_word(uint32_t word, uint32_t& low, uint32_t& high) {
  low = widen_e4m3_pair(__byte_perm(word, 0, 0x1404));
  high = widen_e4m3_pair(__byte_perm(word, 0, 0x3424));
}

// Two e4m3 values as f16, exactly.
__device__ __forceinline__ uint32_t half_of_e4m3(uint32_t pair) {
  uint32_t out;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(static_cast<uint16_t>(pair)));
  return out;
}

// Element i of a row of any float dtype.
__device__ __forceinline__ float element_as_float(const void* row, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kF32:
      return static_cast<const float*>(row)[i];
    case Dtype::kF16:
      return __half2float(static_cast<const __half*>(row)[i]);
    case Dtype::kBF16:
      return __bfloat162float(static_cast<const bf16*>(row)[i]);
    default: {
      const uint32_t byte = static_cast<const uint8_t*>(row)[i];
      return low_float(widen_e4m3_pair(byte << 8));
    }
  }
}

// The larger one, a NaN where there is one.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

// Two floats as e4m3, `low` in the low byte; what is too large becomes 448.
__device__ __forceinline__ uint32_t quantize_pair(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- tensor cores ---------------------------------------------------------------------------------------

// d += a b: a [16, 16] rows of bf16, b [16, 8] columns of bf16, d [16, 8] float32. With g = lane / 4 and
// t = lane % 4, a lane holds
//   a[0] (g, 2t..2t+1)  a[1] (g + 8, 2t..)  a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)
//   b[0] (2t..2t+1, g)  b[1] (2t + 8.., g)
//   d[0], d[1] (g, 2t..2t+1)  d[2], d[3] (g + 8, 2t..2t+1)
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with f16 in place of bf16.
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 2-byte elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address)
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&r)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address)
               : "memory");
}

// ---- copies ---------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, asynchronously; zeros where !is_valid.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, bool is_valid) {
  const int bytes = is_valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A load that streams past the first-level cache: weights are read once.
__device__ __forceinline__ uint4 load_streaming(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Asks for memory into the second-level cache; 16-byte words.
__device__ __forceinline__ void prefetch_bulk(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Asks for what __ldg will read later into the first-level cache.
__device__ __forceinline__ void touch(const void* from) {
  asm volatile("{\n .reg .u32 ignored;\n ld.global.nc.u32 ignored, [%0];\n}" ::"l"(from));
}

// ---- barriers of some warps of a block ------------------------------------------------------------------

// `threads` in all, those that arrive and those that wait.
__device__ __forceinline__ void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_wait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- reductions -----------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Sum over a block of kThreads threads, the same in every thread; `scratch` is free again after a barrier.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x, float* scratch) {  // [kThreads / 32]
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += scratch[i];
  return sum;
}

// ---- launches -------------------------------------------------------------------------------------------

// A kernel of a step may begin while the one before it ends. It calls let_successor_begin() first of all, and
// wait_for_predecessor() before it reads or writes anything that another kernel of the step touches; the
// step's arrays and the weights may be read before. Every kernel waits in at least one of its blocks, so that
// the end of one means the end of all before it.
__device__ __forceinline__ void let_successor_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <class Params>
void launch_overlapped(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes,
                       cudaStream_t stream, const Params& params, const char* name) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  RODIN_CUDA(cudaLaunchKernelEx(&config, kernel, params), " of ", name);
}

// Lets a kernel have so many bytes of dynamic shared memory; once per device.
template <class... Args>
void raise_shared_limit(void (*kernel)(Args...), int bytes) {
  RODIN_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), " to ", bytes);
}
// Multiprocessors that run the kernel keep as much shared memory as there is, so that the kernels ahead and
// behind find room beside it.
template <class... Args>
void keep_shared_memory(void (*kernel)(Args...)) {
  RODIN_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared));
}

inline void check_launch(const char* kernel, const char* file, int line) {
  check_cuda(cudaGetLastError(), kernel, file, line);
}

}  // namespace rodin::cuda

#define RODIN_CHECK_LAUNCH(kernel) ::rodin::cuda::check_launch("launch of " kernel, __FILE__, __LINE__)
