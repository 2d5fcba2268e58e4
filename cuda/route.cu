// Which experts a token goes to, from the router's logits (a float32 linear layer made them): scoring
// function, correction bias, best groups, k largest. One warp a token, the choices in shared memory; ties go
// to the lower index throughout. Bound by latency: k rounds of a warp-wide argmax over E values.
#include <climits>

#include "cuda/common.cuh"

namespace rodin::cuda {
namespace {

constexpr int kWarps = 4;
constexpr float kBanned = -INFINITY;

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
__device__ void keep_best_groups(const RouteParams& route, float* choice, float* group_scores) {
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

__global__ void __launch_bounds__(32 * kWarps) route_kernel(const __grid_constant__ RouteKernelParams p) {
  extern __shared__ float shared[];  // [kWarps, 2 E + num_groups] scores, choice, group scores
  const RouteParams& route = p.route;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int num_experts = static_cast<int>(route.num_experts);
  const int k = static_cast<int>(route.experts_per_token);
  float* scores = shared + warp * (2 * num_experts + static_cast<int>(route.num_groups));
  float* choice = scores + num_experts;
  float* group_scores = choice + num_experts;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (token >= p.num_tokens) return;
  const float* logits = p.logits + token * num_experts;

  float max = kBanned;
  if (route.scoring_func == ScoringFunc::kSoftmax) {
    for (int e = lane; e < num_experts; e += 32) max = fmaxf(max, logits[e]);
    max = warp_max(max);
  }
  float sum = 0;
  for (int e = lane; e < num_experts; e += 32) {
    scores[e] = route.scoring_func == ScoringFunc::kSigmoid ? 1.0f / (1.0f + expf(-logits[e]))
                                                            : expf(logits[e] - max);
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
    }
    __syncwarp();
  }
  const bool is_normalised = route.norm_topk_prob && k > 1;
  for (int j = lane; j < k; j += 32) {
    float& weight = p.expert_weights[token * p.weights_stride + j];
    if (is_normalised) weight = weight / (chosen_sum + 1e-20f);
    weight *= route.routed_scaling_factor;
  }
}

}  // namespace

void run_route(const RouteKernelParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const int64_t floats = kWarps * (2 * params.route.num_experts + params.route.num_groups);
  route_kernel<<<static_cast<unsigned>(ceil_div(params.num_tokens, kWarps)), 32 * kWarps,
                 static_cast<size_t>(floats) * sizeof(float), stream>>>(params);
  RODIN_CHECK_LAUNCH("route_kernel");
}

}  // namespace rodin::cuda
