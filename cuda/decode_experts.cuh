// Shared memory of decode_experts.cu, and the way from the residual to the choice of experts.
#pragma once

#include "cuda/decode_moe.cuh"
#include "cuda/norm.cuh"
#include "cuda/route.cuh"
#include "cuda/split_values.cuh"

namespace rodin::cuda {

constexpr int kWarps = kNormThreads / 32;  // that multiply
constexpr int kThreads = kNormThreads + 32;
constexpr int kClusterBlocks = 8;
constexpr int kGroups = kWarps / 4;  // warpgroups
constexpr int kUnitRows = 4;         // a warp of one warpgroup each
constexpr int kSlots = 3;            // units in the ring
constexpr int kHeadStart = 4;  // routed units of a block that are asked for before the kernel behind begins
constexpr int kOwnSixteenths = 13;  // of the routed units: dealt out, not left to whoever is free
constexpr int kRow = kDecodeInputs;
constexpr int kBlocks = kRow / kBlockK;
constexpr int kNormWords = kRow / (4 * kNormThreads);

struct ExpertRows {
  const char* gate;
  const char* up;
  const float* gate_scale;
  const float* up_scale;
};

struct Unit {
  int slot;  // of the token; kShared: the shared expert; kEnd: there are no more
  int row0;
};
constexpr int kShared = -1, kEnd = -2;

struct Scratch {
  uint8_t rows[kSlots][2][kUnitRows * kRow];  // [kSlots, gate and up, kUnitRows, kRow]; at 1024 bytes
  uint8_t inputs[2][kRow];                    // [high and low parts, kRow]
  bf16 normed[kRow];
  float powers[kBlocks];
  ExpertRows table[kDecodeMostExperts + 1];
  float logits[kDecodeMostExperts];
  float scores[kDecodeMostExperts];
  uint32_t keys[kDecodeMostExperts];  // of the choices
  float route[kDecodeRouteFloats];
  int32_t ids[kDecodeMostChosen];
  float weights[kDecodeMostChosen];
  float norm[kWarps];
  Unit units[kSlots];                            // what lies in the ring
  alignas(16) float scales[kSlots][2][kBlocks];  // [kSlots, gate and up, kBlocks]
  uint64_t full[kSlots], empty[kSlots];
  uint64_t routed;  // all logits are here
  uint64_t chosen;  // ids are
};

// Barriers that were initialised with a fence are seen by the cluster behind it; nothing else is.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// `value` to the same place in block `rank` of the cluster, counted at its barrier.
__device__ __forceinline__ void send(uint32_t to, float value, uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 address, remote;\n"
      "mapa.shared::cluster.u32 address, %0, %3;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [address], %1, [remote];\n}\n" ::"r"(to),
      "r"(__float_as_uint(value)), "r"(barrier), "r"(rank)
      : "memory");
}

// The choice of ungrouped experts as route_registers makes it (route.cuh), by all warps: each takes eight
// experts and counts how many are better.
struct FewExperts {
  static constexpr int kEach = kDecodeMostExperts / kWarps;  // of a warp, 32 / kEach lanes each
  static_assert(kDecodeMostExperts == 64 && kEach == 8);
  float bias = 0;  // of expert kEach * warp + lane, in lanes below kEach

  __device__ __forceinline__ void ask(const RouteKernelParams& p) {
    const int expert = kEach * (threadIdx.x / 32) + threadIdx.x % 32;
    if (threadIdx.x % 32 < kEach && expert < p.route.num_experts && p.correction_bias != nullptr)
      bias = __ldg(p.correction_bias + expert);
  }
  // Ids and scores of the chosen ones, best first.
  __device__ __forceinline__ void choose(const RouteKernelParams& p, Scratch& s) const {
    const int lane = threadIdx.x % 32, first = kEach * (threadIdx.x / 32);
    const int num_experts = static_cast<int>(p.route.num_experts);
    barrier_wait(shared_address(&s.routed), 0);
    __syncwarp();
    float max = 0, sum = 0;
    if (p.route.scoring_func == ScoringFunc::kSoftmax) {
      const float a = lane < num_experts ? s.logits[lane] : kBanned;
      const float b = lane + 32 < num_experts ? s.logits[lane + 32] : kBanned;
      max = warp_max(fmaxf(a, b));
      sum = warp_sum(expf(a - max) + expf(b - max));
    }
    if (lane < kEach) {
      const int expert = first + lane;
      const float logit = expert < num_experts ? s.logits[expert] : kBanned;
      const float score = p.route.scoring_func == ScoringFunc::kSigmoid ? 1.0f / (1.0f + expf(-logit))
                                                                        : expf(logit - max) / sum;
      const float choice = p.correction_bias != nullptr ? score + bias : score;
      s.scores[expert] = score;
      s.keys[expert] = expert < num_experts && choice != kBanned ? key_of(choice + 0.0f) : 0;
    }
    group_sync<1, kNormThreads>();
    constexpr int kLanes = 32 / kEach, kOthers = kDecodeMostExperts / kLanes;
    const int expert = first + lane / kLanes, other = lane % kLanes * kOthers;
    const uint32_t key = s.keys[expert];
    int rank = 0;
#pragma unroll
    for (int i = 0; i < kOthers; i += 4) {
      const uint4 keys = *reinterpret_cast<const uint4*>(&s.keys[other + i]);
      const auto count = [&](uint32_t its, int n) {
        rank += its > key || (its == key && other + n < expert);
      };
      count(keys.x, i), count(keys.y, i + 1), count(keys.z, i + 2), count(keys.w, i + 3);
    }
    rank += __shfl_xor_sync(kAllLanes, rank, 1);
    rank += __shfl_xor_sync(kAllLanes, rank, 2);
    if (lane % kLanes == 0 && rank < p.route.experts_per_token)
      s.ids[rank] = expert, s.weights[rank] = s.scores[expert];
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.chosen));
  }
};

// The choice to device memory, by one warp; weights of ungrouped experts are scores so far.
__device__ __forceinline__ void give_choice(const DecodeExpertsParams& p, const Scratch& s) {
  const RouteParams& route = p.route.route;
  const int lane = threadIdx.x % 32, k = static_cast<int>(route.experts_per_token);
  if (lane < k) {
    float weight = s.weights[lane];
    if (is_route_ungrouped(route)) {
      float sum = 0;
      for (int j = 0; j < k; ++j) sum += s.weights[j];
      weight = chosen_weight(route, weight, sum);
    }
    p.route.expert_ids[lane] = s.ids[lane];
    p.route.expert_weights[lane] = weight;
    __threadfence();
  }
  __syncwarp();
}

// residual + delta and its norm, this warp's share of the logits to all blocks of the cluster.
__device__ __forceinline__ void norm_and_route(const DecodeExpertsParams& p, Scratch& s) {
  const NormParams& n = p.norm;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int num_experts = static_cast<int>(p.route.route.num_experts);
  constexpr int kWords = kRow / 256;  // of 8 inputs
  const int rank = blockIdx.x % kClusterBlocks;
  uint4 router[kWords];  // [kWords] of an expert
  const auto load = [&](int expert) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int col = (i * 32 + lane) * 8;
      router[i] = expert < num_experts ? load_streaming(static_cast<const char*>(p.router.data) +
                                                        expert * p.router.row_bytes + col * 2)
                                       : make_uint4(0, 0, 0, 0);
    }
  };
  int expert = rank * kWarps + warp;
  load(expert);
  float4 weight[kNormWords], value[kNormWords], added[kNormWords];  // [kNormWords]
#pragma unroll
  for (int i = 0; i < kNormWords; ++i) {
    weight[i] = load_four(n.weight + norm_column(i));
  }
  cluster_arrive();
  cluster_wait();
  wait_for_predecessor();
#pragma unroll
  for (int i = 0; i < kNormWords; ++i) {
    value[i] = load_four(static_cast<const float*>(n.x) + norm_column(i));
    added[i] = load_four(static_cast<const bf16*>(n.delta) + norm_column(i));
  }
  add_words<kNormWords>(value, added, kRow);
  const float inverse = inverse_rms(norm_sum<kNormWords>(value, kRow, s.norm), kRow, n.eps);
  store_normed<kNormWords>(value, weight, inverse, kRow, s.normed);
  __syncthreads();
  while (expert < num_experts) {
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint4 x = *reinterpret_cast<const uint4*>(s.normed + (i * 32 + lane) * 8);
      const auto add = [&](uint32_t w, uint32_t v) {
        sum[0] = fmaf(low_float(w), low_float(v), sum[0]);
        sum[1] = fmaf(high_float(w), high_float(v), sum[1]);
      };
      add(router[i].x, x.x), add(router[i].y, x.y), add(router[i].z, x.z), add(router[i].w, x.w);
    }
    const float logit = warp_sum(sum[0] + sum[1]);
    if (lane < kClusterBlocks)
      send(shared_address(&s.logits[expert]), logit, shared_address(&s.routed), lane);
    expert += kClusterBlocks * kWarps;
    if (expert < num_experts) load(expert);
  }
}

// Eight normed inputs of each thread in their two parts.
__device__ __forceinline__ void split_inputs(Scratch& s) {
  const EightValues own(reinterpret_cast<const uint4*>(s.normed)[threadIdx.x]);
  const SplitPower power(largest_of_block(own));
  uint2 high, low;
  split_eight(own.values, power.power, high, low);
  reinterpret_cast<uint2*>(s.inputs[0])[threadIdx.x] = high;
  reinterpret_cast<uint2*>(s.inputs[1])[threadIdx.x] = low;
  if (threadIdx.x % 16 == 0) s.powers[threadIdx.x / 16] = power.scale;
  shared_fence();
  group_sync<1, kNormThreads>();
}

}  // namespace rodin::cuda
