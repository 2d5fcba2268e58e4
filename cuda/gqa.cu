// Grouped-query attention (llama, qwen2) over the paged cache of rotated keys and values, for decode and
// prefill alike: plain and right, not fast.
//
// gqa_store_kernel: a block a token rotates its query heads and keys in place (pairs (i, i + D / 2)) and
// writes the cache row. gqa_attention_kernel: grid (T, A), 8 warps. Warp w takes keys 32 w .. 32 w + 31 of
// each 256 of the row's own positions, a lane a key for the scores and D / 32 columns for the values, with a
// softmax of its own; the warps' results are put together in order. What a row gives depends on its position
// and cache rows alone. Bound by latency for few tokens; each query head reads its group's rows again, from
// the second-level cache.
#include "cuda/common.cuh"

namespace rodin::cuda {
namespace {

constexpr int kStoreThreads = 256;
constexpr int kWarps = 8;
constexpr int kMostColumns = kGqaMaxHeadDim / 32;  // of a lane

__global__ void __launch_bounds__(kStoreThreads) gqa_store_kernel(const __grid_constant__ GqaParams p) {
  let_successor_begin();
  wait_for_predecessor();
  const int64_t token = blockIdx.x;
  const int half = p.head_dim / 2, kv_dim = p.num_kv_heads * p.head_dim;
  bf16* const q = static_cast<bf16*>(p.q) + token * p.q_stride;
  bf16* const kv = static_cast<bf16*>(p.kv) + token * p.kv_stride;
  const float* const angles = p.rope_table + token * p.rope_stride;
  const int slot = p.slots[token];
  bf16* const cache = static_cast<bf16*>(p.cache) + static_cast<int64_t>(slot) * p.cache_stride;
  for (int i = threadIdx.x; i < (p.num_heads + p.num_kv_heads) * half; i += kStoreThreads) {
    const int head = i / half, pair = i % half;
    const bool is_key = head >= p.num_heads;
    const int at = (is_key ? head - p.num_heads : head) * p.head_dim + pair;
    bf16* const row = is_key ? kv : q;
    const float a = __bfloat162float(row[at]), b = __bfloat162float(row[at + half]);
    const float cos = angles[pair], sin = angles[half + pair];
    const bf16 first = __float2bfloat16_rn(a * cos - b * sin),
               second = __float2bfloat16_rn(a * sin + b * cos);
    row[at] = first, row[at + half] = second;
    if (is_key && slot >= 0) cache[at] = first, cache[at + half] = second;
  }
  if (slot < 0) return;
  for (int i = threadIdx.x; i < kv_dim; i += kStoreThreads) cache[kv_dim + i] = kv[kv_dim + i];
}

// q . k of one key; q in shared memory.
__device__ __forceinline__ float score_of(const float* q, const bf16* key, int dim, bool is_aligned) {
  float sum = 0;
  if (is_aligned) {
    for (int c = 0; c < dim; c += 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(key + c);
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum = fmaf(q[c + 2 * i], low_float(pairs[i]), sum);
        sum = fmaf(q[c + 2 * i + 1], high_float(pairs[i]), sum);
      }
    }
  } else {
    for (int c = 0; c < dim; ++c) sum = fmaf(q[c], __bfloat162float(key[c]), sum);
  }
  return sum;
}

__global__ void __launch_bounds__(32 * kWarps) gqa_attention_kernel(const __grid_constant__ GqaParams p) {
  let_successor_begin();
  wait_for_predecessor();
  __shared__ float query[kGqaMaxHeadDim];            // [kGqaMaxHeadDim] scaled, base 2
  __shared__ float partial[kWarps][kGqaMaxHeadDim];  // [kWarps, kGqaMaxHeadDim] not normalised
  __shared__ float max_of[kWarps], sum_of[kWarps];   // [kWarps]
  const int64_t token = blockIdx.x;
  const int head = blockIdx.y, kv_head = head / (p.num_heads / p.num_kv_heads);
  const int dim = p.head_dim, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bf16* const q = static_cast<const bf16*>(p.q) + token * p.q_stride + head * dim;
  const float scale = p.softmax_scale * 1.4426950408889634f;
  for (int c = threadIdx.x; c < dim; c += 32 * kWarps) query[c] = __bfloat162float(q[c]) * scale;
  __syncthreads();
  const int32_t* const table = p.block_table + p.block_table_start[p.seq_of_token[token]];
  const int last = p.cache_positions[token];
  const bool is_aligned = dim % 8 == 0 && p.cache_stride % 8 == 0;
  float max = -INFINITY, sum = 0;
  float out[kMostColumns] = {};  // [kMostColumns] column lane + 32 i
  for (int first = p.first_position + 32 * warp; first <= last; first += 32 * kWarps) {
    const int position = first + lane;
    int64_t row = 0;
    float score = -INFINITY;
    if (position <= last) {
      row = (static_cast<int64_t>(table[position / p.block_size]) * p.block_size + position % p.block_size) *
            p.cache_stride;
      score = score_of(query, static_cast<const bf16*>(p.cache) + row + kv_head * dim, dim, is_aligned);
    }
    float most = score;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
    most = fmaxf(most, max);
    const float shrink = max == -INFINITY ? 0.0f : exp2f(max - most);
    const float weight = score == -INFINITY ? 0.0f : exp2f(score - most);
    sum = sum * shrink + warp_sum(weight);
    max = most;
#pragma unroll
    for (int i = 0; i < kMostColumns; ++i) out[i] *= shrink;
    const int keys = min(32, last - first + 1);
    for (int key = 0; key < keys; ++key) {
      const float share = __shfl_sync(kAllLanes, weight, key);
      const bf16* const value = static_cast<const bf16*>(p.cache) + __shfl_sync(kAllLanes, row, key) +
                                (p.num_kv_heads + kv_head) * dim;
#pragma unroll
      for (int i = 0; i < kMostColumns; ++i) {
        const int c = lane + 32 * i;
        if (c < dim) out[i] = fmaf(share, __bfloat162float(value[c]), out[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMostColumns; ++i) {
    if (lane + 32 * i < dim) partial[warp][lane + 32 * i] = out[i];
  }
  if (lane == 0) max_of[warp] = max, sum_of[warp] = sum;
  __syncthreads();
  float most = -INFINITY, total = 0;
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, max_of[w]);
  for (int w = 0; w < kWarps; ++w) total = fmaf(sum_of[w], exp2f(max_of[w] - most), total);
  bf16* const to = static_cast<bf16*>(p.out) + token * p.out_stride + head * dim;
  for (int c = threadIdx.x; c < dim; c += 32 * kWarps) {
    float value = 0;
    for (int w = 0; w < kWarps; ++w) value = fmaf(partial[w][c], exp2f(max_of[w] - most), value);
    to[c] = __float2bfloat16_rn(value / total);
  }
}

}  // namespace

void run_gqa_store(const GqaParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  launch_overlapped(gqa_store_kernel, dim3(static_cast<unsigned>(params.num_tokens)), kStoreThreads, 0,
                    stream, params, "gqa_store_kernel");
}

void run_gqa_attention(const GqaParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const dim3 grid(static_cast<unsigned>(params.num_tokens), static_cast<unsigned>(params.num_heads));
  launch_overlapped(gqa_attention_kernel, grid, 32 * kWarps, 0, stream, params, "gqa_attention_kernel");
}

}  // namespace rodin::cuda
