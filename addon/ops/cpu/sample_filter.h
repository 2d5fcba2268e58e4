// The filters of sampling over one row's scores: min_p, then top_k, then top_p (see ops/sample_args.h).
#pragma once

#include <cstdint>

namespace rodin {

struct SampleFilter {
  float min_p = 0;    // 0 is off
  int32_t top_k = 0;  // 0 is off
  float top_p = 1;    // 1 is off

  bool is_off() const { return min_p == 0 && top_k == 0 && top_p >= 1; }
};

// Writes the ids that survive to ids[0 .. n-1], in no fixed order, and returns n. Every score is at most 0,
// one is 0; -infinity never survives. `weights` is working memory.
int64_t filter_scores(const SampleFilter& filter, const float* scores, int64_t vocab_size, float* weights,
                      int32_t* ids);  // scores, weights, ids: [vocab_size]

}  // namespace rodin
