#include "ops/cpu/sample_filter.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/noise.h"

namespace rodin {
namespace {

constexpr int kNumBuckets = 512;
constexpr float kBucketsPerUnit = 16;  // the last bucket begins at e^-31.9 of the likeliest

// Likelier first, ties to the lower id.
struct Likelier {
  const float* scores;  // [vocab_size]
  bool operator()(int32_t a, int32_t b) const {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  }
};

int bucket_of(float score) {
  return static_cast<int>(std::min(-score * kBucketsPerUnit, static_cast<float>(kNumBuckets - 1)));
}

// The shortest run of the likeliest of ids[0 .. n-1] whose mass reaches top_p. Buckets of near scores are
// summed first, so that only the bucket in which the run ends has to be sorted.
int64_t keep_top_p(float top_p, const float* scores, float* weights, int32_t* ids, int64_t n) {
  for (int64_t i = 0; i < n; ++i) weights[i] = exp_non_positive(scores[ids[i]]);
  double mass[kNumBuckets] = {};  // [kNumBuckets]
  for (int64_t i = 0; i < n; ++i) mass[bucket_of(scores[ids[i]])] += static_cast<double>(weights[i]);
  double total = 0;
  for (double m : mass) total += m;
  const double wanted = static_cast<double>(top_p) * total;

  int last = 0;
  double reached = 0;  // mass of the buckets before `last`
  while (last < kNumBuckets - 1 && reached + mass[last] < wanted) reached += mass[last++];

  const auto in_whole_bucket = [&](int32_t id) { return bucket_of(scores[id]) < last; };
  const auto in_kept_bucket = [&](int32_t id) { return bucket_of(scores[id]) <= last; };
  int32_t* kept_end = std::partition(ids, ids + n, in_kept_bucket);
  int32_t* next = std::partition(ids, kept_end, in_whole_bucket);
  std::sort(next, kept_end, Likelier{scores});
  while (next != kept_end && reached < wanted) {
    reached += static_cast<double>(exp_non_positive(scores[*next]));
    ++next;
  }
  return std::max<int64_t>(next - ids, 1);
}

}  // namespace

int64_t filter_scores(const SampleFilter& filter, const float* scores, int64_t vocab_size, float* weights,
                      int32_t* ids) {
  const float lowest = filter.min_p > 0 ? static_cast<float>(std::log(static_cast<double>(filter.min_p)))
                                        : std::numeric_limits<float>::lowest();
  int64_t n = 0;
  for (int64_t id = 0; id < vocab_size; ++id) {
    ids[n] = static_cast<int32_t>(id);
    n += scores[id] >= lowest;
  }
  if (filter.top_k > 0 && filter.top_k < n) {
    std::nth_element(ids, ids + filter.top_k, ids + n, Likelier{scores});
    n = filter.top_k;
    std::sort(ids, ids + n);  // the sums of top_p go in the order of ids
  }
  if (filter.top_p < 1) n = keep_top_p(filter.top_p, scores, weights, ids, n);
  return n;
}

}  // namespace rodin
