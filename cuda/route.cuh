// Which experts a token goes to, from the router's logits: the work of one warp, for the kernels that do it.
#pragma once

#include <climits>

#include "cuda/common.cuh"

namespace rodin::cuda {

constexpr float kBanned = -INFINITY;

// Wherever it lies; what another block, or another block of the cluster, has written.
__device__ __forceinline__ float load_logit(const float* from) {
  float logit;
  asm volatile("ld.relaxed.gpu.f32 %0, [%1];" : "=f"(logit) : "l"(from) : "memory");
  return logit;
}

struct Best {
  float value;
  int index;  // INT_MAX: none
};

__device__ __forceinline__ bool is_better(const Best& a, const Best& b) {
  if (b.index == INT_MAX) return a.index != INT_MAX;
  return a.index != INT_MAX && (a.value > b.value || (a.value == b.value && a.index < b.index));
}

// The largest of values[first .. first + count - 1] that is not banned and not at `skip`, the same in every
// lane.
__device__ __forceinline__ Best warp_best(const float* values, int first, int count, int skip) {
  Best best = {kBanned, INT_MAX};
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const Best candidate = {values[first + i], first + i};
    if (candidate.value != kBanned && candidate.index != skip && is_better(candidate, best)) best = candidate;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Best other = {__shfl_xor_sync(kAllLanes, best.value, offset),
                        __shfl_xor_sync(kAllLanes, best.index, offset)};
    if (is_better(other, best)) best = other;
  }
  return best;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// Bans every expert outside the best groups.
__device__ inline void keep_best_groups(const RouteParams& route, float* choice, float* group_scores) {
  const int lane = threadIdx.x % 32;
  const int num_groups = static_cast<int>(route.num_groups);
  const int group_size = static_cast<int>(route.num_experts) / num_groups;
  for (int group = 0; group < num_groups; ++group) {
    const Best first = warp_best(choice, group * group_size, group_size, -1);
    float score = first.index == INT_MAX ? kBanned : first.value;
    if (route.topk_method == TopkMethod::kNoauxTc && group_size > 1) {
      const Best second = warp_best(choice, group * group_size, group_size, first.index);
      score += second.index == INT_MAX ? kBanned : second.value;
    }
    if (lane == 0) group_scores[group] = score;
  }
  __syncwarp();
  for (int kept = 0; kept < static_cast<int>(route.topk_groups); ++kept) {
    const Best best = warp_best(group_scores, 0, num_groups, -1);
    if (best.index == INT_MAX) break;
    __syncwarp();
    if (lane == 0) group_scores[best.index] = kBanned;  // kept: taken out of the running
    __syncwarp();
  }
  for (int e = lane; e < static_cast<int>(route.num_experts); e += 32) {
    if (group_scores[e / group_size] != kBanned) choice[e] = kBanned;
  }
  __syncwarp();
}

// The weight of a chosen expert, from its score and the sum of those of all k that are chosen.
__device__ __forceinline__ float chosen_weight(const RouteParams& route, float score, float sum) {
  if (route.norm_topk_prob && route.experts_per_token > 1) score = score / (sum + 1e-20f);
  return score * route.routed_scaling_factor;
}

// The plan of a single token: a tile for each of its experts, which are all different. Slot j's part.
__device__ __forceinline__ void plan_slot(const RouteKernelParams& p, int j, int expert) {
  p.plan.order[j] = j;
  p.plan.tiles[j] = {expert, j, 1, 0};
}

__device__ __forceinline__ void plan_rest(const RouteKernelParams& p) {
  const int k = static_cast<int>(p.route.experts_per_token);
  if (p.has_shared) p.plan.tiles[k] = {static_cast<int>(p.route.num_experts), 0, 1, 0};
  *p.plan.num_tiles = k + (p.has_shared ? 1 : 0);
}

// Larger floats have larger keys; 0 is below all of them.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr int kMostEach = 8;  // experts of a lane

// The usual case, all experts in one group and at most 32 kEach of them: scores and choices stay in
// registers, expert lane + 32 i in place i of a lane.
//
// wait_for_logits(): called when all that is known before them is on its way.
template <int kEach, class Wait>
__device__ __forceinline__ void route_registers(const RouteKernelParams& p, int64_t token,
                                                const Wait& wait_for_logits) {
  const RouteParams& route = p.route;
  const int lane = threadIdx.x % 32;
  const int num_experts = static_cast<int>(route.num_experts);
  const int k = static_cast<int>(route.experts_per_token);
  float score[kEach];   // [kEach]
  uint32_t key[kEach];  // [kEach] of the choice; 0: banned
  float bias[kEach];    // [kEach]
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int e = lane + 32 * i;
    bias[i] = p.correction_bias != nullptr && e < num_experts ? p.correction_bias[e] : 0.0f;
  }
  wait_for_logits();
  if (token >= p.num_tokens) return;
  const float* logits = p.logits + token * num_experts;
  float max = kBanned;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int e = lane + 32 * i;
    score[i] = e < num_experts ? load_logit(logits + e) : kBanned;
    max = fmaxf(max, score[i]);
  }
  if (route.scoring_func == ScoringFunc::kSigmoid) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) score[i] = 1.0f / (1.0f + expf(-score[i]));
  } else {
    max = warp_max(max);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      score[i] = expf(score[i] - max);
      if (lane + 32 * i < num_experts) sum += score[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < kEach; ++i) score[i] = score[i] / sum;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float choice = p.correction_bias != nullptr ? score[i] + bias[i] : score[i];
    key[i] = lane + 32 * i < num_experts && choice != kBanned ? key_of(choice + 0.0f) : 0;
  }
  float chosen_sum = 0;
  float own_weight = 0;  // lane j: of slot j
  for (int j = 0; j < k; ++j) {
    uint32_t best_key = 0;
    int best = INT_MAX;
    float best_score = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (key[i] > best_key) best_key = key[i], best = lane + 32 * i, best_score = score[i];
    }
    const uint32_t most = __reduce_max_sync(kAllLanes, best_key);
    int chosen =
        __reduce_min_sync(kAllLanes, best_key == most && most != 0 ? static_cast<unsigned>(best) : INT_MAX);
    if (chosen == INT_MAX) chosen = j;  // only where scores are not finite: any distinct experts will do
    if (lane == chosen % 32 && best != chosen) {
      best_score = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (lane + 32 * i == chosen) best_score = score[i];
      }
    }
    const float value = __shfl_sync(kAllLanes, best_score, chosen % 32);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (lane + 32 * i == chosen) key[i] = 0;
    }
    chosen_sum += value;
    if (lane == j % 32) own_weight = value;
    if (lane == 0) {
      p.expert_ids[token * p.ids_stride + j] = chosen;
      if (p.plan.order != nullptr) plan_slot(p, j, chosen);
    }
    if (j % 32 == 31 || j + 1 == k) {
      if (lane <= j % 32) p.expert_weights[token * p.weights_stride + j / 32 * 32 + lane] = own_weight;
    }
  }
  if (lane == 0 && p.plan.order != nullptr) plan_rest(p);
  __syncwarp();
  for (int j = lane; j < k; j += 32) {
    float& weight = p.expert_weights[token * p.weights_stride + j];
    weight = chosen_weight(route, weight, chosen_sum);
  }
}

// Of few experts, whose lanes then have less to do one after the other, or many.
template <class Wait>
__device__ __forceinline__ void route_ungrouped(const RouteKernelParams& p, int64_t token,
                                                const Wait& wait_for_logits) {
  if (p.route.num_experts <= 64) {
    route_registers<2>(p, token, wait_for_logits);
  } else {
    route_registers<kMostEach>(p, token, wait_for_logits);
  }
}

// Floats of shared memory that route_grouped takes for a token.
__host__ __device__ inline int64_t route_scratch(const RouteParams& route) {
  return 2 * route.num_experts + route.num_groups;
}

__device__ __forceinline__ void route_grouped(const RouteKernelParams& p, int64_t token, float* scores) {
  const RouteParams& route = p.route;
  const int lane = threadIdx.x % 32;
  const int num_experts = static_cast<int>(route.num_experts);
  const int k = static_cast<int>(route.experts_per_token);
  float* choice = scores + num_experts;  // scores: [E] and these, [E] and [num_groups]
  float* group_scores = choice + num_experts;
  if (token >= p.num_tokens) return;
  const float* logits = p.logits + token * num_experts;

  float max = kBanned;
  if (route.scoring_func == ScoringFunc::kSoftmax) {
    for (int e = lane; e < num_experts; e += 32) max = fmaxf(max, load_logit(logits + e));
    max = warp_max(max);
  }
  float sum = 0;
  for (int e = lane; e < num_experts; e += 32) {
    scores[e] = route.scoring_func == ScoringFunc::kSigmoid ? 1.0f / (1.0f + expf(-load_logit(logits + e)))
                                                            : expf(load_logit(logits + e) - max);
    sum += scores[e];
  }
  sum = warp_sum(sum);
  for (int e = lane; e < num_experts; e += 32) {
    if (route.scoring_func == ScoringFunc::kSoftmax) scores[e] = scores[e] / sum;
    choice[e] = p.correction_bias ? scores[e] + p.correction_bias[e] : scores[e];
  }
  __syncwarp();
  if (route.topk_method != TopkMethod::kGreedy && route.num_groups > 1)
    keep_best_groups(route, choice, group_scores);

  float chosen_sum = 0;
  for (int j = 0; j < k; ++j) {
    int best = warp_best(choice, 0, num_experts, -1).index;
    if (best == INT_MAX) best = j;  // only where scores are not finite: any distinct experts will do
    __syncwarp();
    const float score = scores[best];
    chosen_sum += score;
    if (lane == 0) {
      p.expert_ids[token * p.ids_stride + j] = best;
      p.expert_weights[token * p.weights_stride + j] = score;
      choice[best] = kBanned;
      if (p.plan.order != nullptr) plan_slot(p, j, best);
    }
    __syncwarp();
  }
  if (lane == 0 && p.plan.order != nullptr) plan_rest(p);
  for (int j = lane; j < k; j += 32) {
    float& weight = p.expert_weights[token * p.weights_stride + j];
    weight = chosen_weight(route, weight, chosen_sum);
  }
}

// Whether route_ungrouped takes these.
__host__ __device__ inline bool is_route_ungrouped(const RouteParams& route) {
  const bool is_grouped = route.topk_method != TopkMethod::kGreedy && route.num_groups > 1;
  return !is_grouped && route.num_experts <= 32 * kMostEach;
}

}  // namespace rodin::cuda
