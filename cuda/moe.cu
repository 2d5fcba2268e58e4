// The mixture of experts around its two grouped linear layers (linear_tile.cuh): which tokens each expert
// gets, and the weighted sum of what the experts made of a token.
//
// moe_plan_kernel: one block. Slots t * k + j sorted by expert, cut into tiles of tile_tokens; the shared
// expert is one more expert that takes every token. Order within an expert is arbitrary: a row's result does
// not depend on its place in a tile. moe_combine_kernel: out = sum_j weight_j y_j in slot order, then +
// shared. Grid: (column chunks, T); bound by bytes: (k + 1) H in, H out.
#include <algorithm>

#include "cuda/common.cuh"

namespace rodin::cuda {
namespace {

constexpr int kPlanThreads = 1024;
constexpr int kPlanAtOnce = 8;

__global__ void __launch_bounds__(kPlanThreads) moe_plan_kernel(const __grid_constant__ MoePlanParams p) {
  let_successor_begin();
  wait_for_predecessor();
  extern __shared__ int32_t shared[];  // [3 E] count, place in `order`, first tile
  int32_t* count = shared;
  int32_t* place = shared + p.num_experts;
  int32_t* first_tile = shared + 2 * p.num_experts;
  const int num_slots = p.num_tokens * p.experts_per_token;
  const bool is_dense = p.ids_stride == p.experts_per_token;
  const auto expert_of = [&](int slot) {
    return p
        .expert_ids[is_dense ? slot : slot / p.experts_per_token * p.ids_stride + slot % p.experts_per_token];
  };
  // Calls f(slot, expert) for each slot, with several loads in flight.
  const auto for_slots = [&](const auto& f) {
    for (int first = threadIdx.x; first < num_slots; first += kPlanAtOnce * kPlanThreads) {
      int experts[kPlanAtOnce];  // [kPlanAtOnce]
#pragma unroll
      for (int i = 0; i < kPlanAtOnce; ++i) {
        const int slot = first + i * kPlanThreads;
        experts[i] = slot < num_slots ? expert_of(slot) : -1;
      }
#pragma unroll
      for (int i = 0; i < kPlanAtOnce; ++i) {
        if (experts[i] >= 0) f(first + i * kPlanThreads, experts[i]);
      }
    }
  };
  for (int e = threadIdx.x; e < p.num_experts; e += kPlanThreads) count[e] = 0;
  __syncthreads();
  for_slots([&](int, int expert) { atomicAdd(&count[expert], 1); });
  __syncthreads();
  if (threadIdx.x < 32) {  // running sums of counts and tiles
    const int lane = threadIdx.x;
    int slots = 0, tiles = 0;
    for (int base = 0; base < p.num_experts; base += 32) {
      const int e = base + lane;
      const int own_slots = e < p.num_experts ? count[e] : 0;
      const int own_tiles = (own_slots + p.tile_tokens - 1) / p.tile_tokens;
      int slot_sum = own_slots, tile_sum = own_tiles;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other_slots = __shfl_up_sync(kAllLanes, slot_sum, offset);
        const int other_tiles = __shfl_up_sync(kAllLanes, tile_sum, offset);
        if (lane >= offset) slot_sum += other_slots, tile_sum += other_tiles;
      }
      if (e < p.num_experts) {
        place[e] = slots + slot_sum - own_slots;
        first_tile[e] = tiles + tile_sum - own_tiles;
      }
      slots += __shfl_sync(kAllLanes, slot_sum, 31);
      tiles += __shfl_sync(kAllLanes, tile_sum, 31);
    }
    const int shared_tiles = p.has_shared ? (p.num_tokens + p.tile_tokens - 1) / p.tile_tokens : 0;
    for (int i = lane; i < shared_tiles; i += 32) {
      const int first = i * p.tile_tokens;
      p.plan.tiles[tiles + i] = {p.num_experts, first, min(p.tile_tokens, p.num_tokens - first), 0};
    }
    if (lane == 0) *p.plan.num_tiles = tiles + shared_tiles;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.num_experts; e += kPlanThreads) {
    for (int done = 0, tile = first_tile[e]; done < count[e]; done += p.tile_tokens, ++tile) {
      p.plan.tiles[tile] = {e, place[e] + done, min(p.tile_tokens, count[e] - done), 0};
    }
  }
  __syncthreads();
  for_slots([&](int slot, int expert) { p.plan.order[atomicAdd(&place[expert], 1)] = slot; });
}

constexpr int kCombineThreads = 128;

// kPairs pairs of columns of a thread; rows of the experts' outputs begin at multiples of 16 bytes and are
// padded to whole 16 bytes.
template <int kPairs>
__global__ void __launch_bounds__(kCombineThreads)
    moe_combine_kernel(const __grid_constant__ MoeCombineParams p) {
  let_successor_begin();
  wait_for_predecessor();
  const int64_t token = blockIdx.y;
  const int col = (blockIdx.x * kCombineThreads + threadIdx.x) * 2 * kPairs;
  if (col >= p.cols) return;
  const auto load = [&](uint32_t(&pairs)[kPairs], const void* data, int64_t row) {
    const bf16* from = static_cast<const bf16*>(data) + row * p.stride + col;
    if constexpr (kPairs == 4) {
      const uint4 words = *reinterpret_cast<const uint4*>(from);
      pairs[0] = words.x, pairs[1] = words.y, pairs[2] = words.z, pairs[3] = words.w;
    } else {
      pairs[0] = *reinterpret_cast<const uint32_t*>(from);
    }
  };
  float low[kPairs] = {}, high[kPairs] = {};  // [kPairs]
  uint32_t pairs[kPairs];                     // [kPairs]
  for (int j = 0; j < p.experts_per_token; ++j) {
    const float weight = p.expert_weights[token * p.weights_stride + j];
    load(pairs, p.routed, token * p.experts_per_token + j);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low[i] = fmaf(weight, low_float(pairs[i]), low[i]);
      high[i] = fmaf(weight, high_float(pairs[i]), high[i]);
    }
  }
  if (p.shared) {
    load(pairs, p.shared, token);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) low[i] += low_float(pairs[i]), high[i] += high_float(pairs[i]);
  }
  bf16* out = static_cast<bf16*>(p.out) + token * p.out_stride + col;
  if constexpr (kPairs == 4) {
    *reinterpret_cast<uint4*>(out) = make_uint4(pack_bf16(low[0], high[0]), pack_bf16(low[1], high[1]),
                                                pack_bf16(low[2], high[2]), pack_bf16(low[3], high[3]));
  } else {
    out[0] = __float2bfloat16_rn(low[0]);
    if (col + 1 < p.cols) out[1] = __float2bfloat16_rn(high[0]);
  }
}

}  // namespace

int32_t moe_max_tiles(const MoePlanParams& p) {
  const int64_t slots = static_cast<int64_t>(p.num_tokens) * p.experts_per_token;
  const int64_t shared = p.has_shared ? ceil_div(p.num_tokens, p.tile_tokens) : 0;
  return static_cast<int32_t>(std::min(slots, slots / p.tile_tokens + p.num_experts) + shared);
}

void run_moe_plan(const MoePlanParams& params, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(params.num_experts) * 3 * sizeof(int32_t);
  launch_overlapped(moe_plan_kernel, dim3(1), kPlanThreads, bytes, stream, params, "moe_plan_kernel");
}

void run_moe_combine(const MoeCombineParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  // Many tokens fill the GPU with wide loads; few of them need every thread.
  const bool is_wide = params.num_tokens >= 256 && params.cols % 8 == 0 && params.out_stride % 8 == 0 &&
                       reinterpret_cast<uintptr_t>(params.out) % 16 == 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.cols, (is_wide ? 8 : 2) * kCombineThreads)),
                  static_cast<unsigned>(params.num_tokens));
  launch_overlapped(is_wide ? moe_combine_kernel<4> : moe_combine_kernel<1>, grid, kCombineThreads, 0, stream,
                    params, "moe_combine_kernel");
}

}  // namespace rodin::cuda
