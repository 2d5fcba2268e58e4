#include "ops/cpu/host_ops.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "ops/check.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rodin {

void* HostOps::alloc(size_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* data = rounded < bytes ? nullptr : std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  check(data != nullptr, "cannot allocate ", bytes,
        " bytes of memory; lower the cache memory or the step size");
#if defined(__linux__)
  if (bytes >= kHugePage) madvise(data, rounded, MADV_HUGEPAGE);  // where there are none, small ones do
#endif
  return data;
}

void HostOps::free(void* data) { std::free(data); }

void HostOps::upload(void* device, const void* host, size_t bytes) { memcpy(device, host, bytes); }

void HostOps::download(void* host, const void* device, size_t bytes) { memcpy(host, device, bytes); }

size_t HostOps::reserve(const OpsLimits& limits) {
  limits_ = limits;
  sample_scratch_ = std::make_unique<SampleScratch>(limits.vocab_size, pool_.num_threads());
  return static_cast<size_t>(sample_scratch_->bytes());
}

void HostOps::rope_table(const StepIndex& index, const RopeParams& params, const Tensor& table) {
  const int64_t half = table.cols / 2;
  pool_.parallel_for((index.num_tokens + 15) / 16, [&](int64_t task, int) {
    const int64_t end = std::min(index.num_tokens, (task + 1) * 16);
    for (int64_t t = task * 16; t < end; ++t) {
      float* row = table.row<float>(t);
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(index.rope_positions[t]) * params.inv_freq[i];
        row[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * params.multiplier;
        row[half + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * params.multiplier;
      }
    }
  });
}

void HostOps::gather_rows(const Tensor& from, const int32_t* rows, const Tensor& to) {
  const size_t bytes = static_cast<size_t>(to.cols * dtype_bytes(to.dtype));
  for (int64_t i = 0; i < to.rows; ++i) {
    const Tensor source = from.slice_rows(rows[i], 1);
    memcpy(to.slice_rows(i, 1).data, source.data, bytes);
  }
}

void HostOps::sample(const SampleArgs& args) {
  SampleArgs with_scratch = args;
  with_scratch.scratch = sample_scratch_.get();
  sample_rows(pool_, with_scratch);
}

void apply_rope(float* x, const float* angles, int64_t rope_dim, bool interleave) {
  const int64_t half = rope_dim / 2;
  const float* cos = angles;
  const float* sin = angles + half;
  for (int64_t i = 0; i < half; ++i) {
    float& a = interleave ? x[2 * i] : x[i];
    float& b = interleave ? x[2 * i + 1] : x[half + i];
    const float a0 = a;
    const float b0 = b;
    a = a0 * cos[i] - b0 * sin[i];
    b = a0 * sin[i] + b0 * cos[i];
  }
}

namespace {

constexpr float kBanned = -std::numeric_limits<float>::infinity();

// Index of the largest of x[0 .. n-1]; ties, and rows of NaN, go to the lower index.
int64_t largest_index(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (x[i] > x[best]) best = i;
  }
  return best;
}

// Bans every expert outside the topk_groups best groups.
void keep_best_groups(const RouteParams& route, float* choice, float* group_scores) {
  const int64_t group_size = route.num_experts / route.num_groups;
  for (int64_t g = 0; g < route.num_groups; ++g) {
    const float* group = choice + g * group_size;
    const int64_t first = largest_index(group, group_size);
    group_scores[g] = group[first];
    if (route.topk_method != TopkMethod::kNoauxTc) continue;
    float second = kBanned;
    for (int64_t i = 0; i < group_size; ++i) {
      if (i != first && group[i] > second) second = group[i];
    }
    if (group_size > 1) group_scores[g] += second;
  }
  for (int64_t kept = 0; kept < route.topk_groups; ++kept) {
    int64_t best = -1;
    for (int64_t g = 0; g < route.num_groups; ++g) {
      if (group_scores[g] != kBanned && (best < 0 || group_scores[g] > group_scores[best])) best = g;
    }
    if (best < 0) break;
    group_scores[best] = kBanned;  // kept: taken out of the running
  }
  for (int64_t e = 0; e < route.num_experts; ++e) {
    if (group_scores[e / group_size] != kBanned) choice[e] = kBanned;
  }
}

}  // namespace

void choose_experts(const float* scores, const MoeWeights& moe, float* choice, float* group_scores,
                    int32_t* expert_ids, float* expert_weights) {
  const RouteParams& route = moe.route;
  const bool has_bias = route.topk_method == TopkMethod::kNoauxTc;
  for (int64_t e = 0; e < route.num_experts; ++e) {
    choice[e] = has_bias ? scores[e] + moe.correction_bias[e] : scores[e];
  }
  if (route.topk_method != TopkMethod::kGreedy && route.num_groups > 1) {
    keep_best_groups(route, choice, group_scores);
  }
  float sum = 0;
  for (int64_t j = 0; j < route.experts_per_token; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < route.num_experts; ++e) {
      if (choice[e] != kBanned && (best < 0 || choice[e] > choice[best])) best = e;
    }
    if (best < 0) best = j;  // only where scores are not finite: any distinct experts will do
    expert_ids[j] = static_cast<int32_t>(best);
    expert_weights[j] = scores[best];
    sum += scores[best];
    choice[best] = kBanned;
  }
  const bool is_normalised = route.norm_topk_prob && route.experts_per_token > 1;
  for (int64_t j = 0; j < route.experts_per_token; ++j) {
    if (is_normalised) expert_weights[j] = expert_weights[j] / (sum + 1e-20f);
    expert_weights[j] *= route.routed_scaling_factor;
  }
}

}  // namespace rodin
