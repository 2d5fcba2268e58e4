// Before attention in its naive form: latents of the cache, gathered by slot, in FP8 with a scale for each
// kBlockK of them, so that kv_b is a linear layer over them; and their rotated keys. mla_gather_kernel: a
// warp for each key; bound by bytes. An FP8 cache's rows are copied as they are.
#include "cuda/common.cuh"
#include "cuda/quantized.h"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 256;

template <bool kFp8>
__global__ void __launch_bounds__(kThreads) mla_gather_kernel(const __grid_constant__ MlaGatherParams p) {
  let_successor_begin();
  wait_for_predecessor();
  const int64_t key = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (key >= p.num_keys) return;
  const int lane = threadIdx.x % 32;
  const int num_groups = p.lora_rank / kBlockK;
  const char* from = static_cast<const char*>(p.cache) + p.slots[key] * p.cache_stride * (kFp8 ? 1 : 2);
  char* to = static_cast<char*>(p.latents.data) + key * p.latents.stride;
  const uint32_t* rope =
      reinterpret_cast<const uint32_t*>(from + (kFp8 ? p.lora_rank + num_groups * 4 : p.lora_rank * 2));
  uint32_t* rope_to = static_cast<uint32_t*>(p.rope) + key * (p.rope_dim / 2);
  for (int i = lane; i < p.rope_dim / 2; i += 32) rope_to[i] = rope[i];
  if constexpr (kFp8) {
    for (int i = lane; i < p.lora_rank / 16; i += 32)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    if (lane < num_groups) {
      p.latents.scale[lane * p.latents.scale_stride + key] =
          reinterpret_cast<const float*>(from + p.lora_rank)[lane];
    }
  } else {
    for (int group = 0; group < num_groups; ++group) {
      const uint2 words = reinterpret_cast<const uint2*>(from)[group * 32 + lane];
      const float values[4] = {low_float(words.x), high_float(words.x), low_float(words.y),
                               high_float(words.y)};
      float most = max_or_nan(max_or_nan(fabsf(values[0]), fabsf(values[1])),
                              max_or_nan(fabsf(values[2]), fabsf(values[3])));
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2)
        most = max_or_nan(most, __shfl_xor_sync(kAllLanes, most, offset));
      const float inverse = most == 0 ? 0.0f : 448.0f / most;
      reinterpret_cast<uint32_t*>(to)[group * 32 + lane] =
          quantize_pair(values[0] * inverse, values[1] * inverse) |
          quantize_pair(values[2] * inverse, values[3] * inverse) << 16;
      if (lane == 0) p.latents.scale[group * p.latents.scale_stride + key] = most / 448.0f;
    }
  }
}

}  // namespace

void run_mla_gather(const MlaGatherParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.num_keys, kThreads / 32)));
  launch_overlapped(params.is_cache_fp8 ? mla_gather_kernel<true> : mla_gather_kernel<false>, grid, kThreads,
                    0, stream, params, "mla_gather_kernel");
}

}  // namespace rodin::cuda
