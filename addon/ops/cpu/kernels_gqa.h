// Grouped-query attention over one tile of cached keys and values. Included by one translation unit per
// instruction path.
#pragma once

#include "ops/cpu/kernels_linear.h"

namespace rodin {
namespace {

// scores[j] <- exp(scores[j] - *row_max) for the keys first .. end - 1 and 0 for the others; *row_sum is
// their sum.
inline void softmax_tile(float* scores, int64_t first, int64_t end, float* row_max, float* row_sum) {
  for (int64_t j = 0; j < first; ++j) scores[j] = -__builtin_inff();
  for (int64_t j = end; j < kKeyTile; ++j) scores[j] = -__builtin_inff();
  V largest = load(scores);
  for (int64_t j = kLanes; j < kKeyTile; j += kLanes) largest = max(largest, load(scores + j));
  *row_max = hmax(largest);
  for (int64_t j = 0; j < kKeyTile; j += kLanes) {
    store(scores + j, exp(sub(load(scores + j), set1(*row_max))));
  }
  for (int64_t j = 0; j < first; ++j) scores[j] = 0.0f;
  for (int64_t j = end; j < kKeyTile; ++j) scores[j] = 0.0f;
  V sum = zero();
  for (int64_t j = 0; j < kKeyTile; j += kLanes) sum = add(sum, load(scores + j));
  *row_sum = hsum(sum);
}

// The query rows row0 .. row0 + R - 1; one past the end repeats the last.
template <int R>
inline void attend_gqa_rows(const AttendGqaArgs& args, int64_t row0) {
  constexpr int kKeys = kAccumulators / R;
  const float* q[R];          // [R]
  float* out[R];              // [R]
  const float* weights[R];    // [R] rows of [kKeyTile]
  float scores[R][kKeyTile];  // [R, kKeyTile]
  for (int r = 0; r < R; ++r) {
    const int64_t row = min_of(row0 + r, args.num_rows - 1);
    q[r] = args.q[row];
    out[r] = args.out[row];
    weights[r] = scores[r];
  }
  for (int64_t j = args.first / kKeys * kKeys; j < args.end; j += kKeys) {
    const char* keys[kKeys];  // [kKeys]
    for (int i = 0; i < kKeys; ++i) {
      const int64_t key = j + i < args.first ? args.first : min_of(j + i, args.end - 1);
      keys[i] = reinterpret_cast<const char*>(args.keys[key]);
    }
    V sums[kAccumulators];
    dot_tile<ReadCache, false, kKeys, R>(keys, nullptr, 1.0f, q, args.head_dim, args.head_dim, sums);
    float results[kAccumulators];  // [kKeys, R]
    reduce(sums, results);
    for (int i = 0; i < kKeys; ++i) {
      for (int r = 0; r < R; ++r) scores[r][j + i] = results[i * R + r] * args.scale;
    }
  }
  for (int r = 0; r < R; ++r) {
    const int64_t row = min_of(row0 + r, args.num_rows - 1);
    softmax_tile(scores[r], args.first, args.end, args.max + row, args.sum + row);
  }
  const auto value = [&](int64_t j) { return reinterpret_cast<const char*>(args.keys[j] + args.value_at); };
  mix_columns<ReadCache, R>(weights, value, args.first, args.end, 0, args.head_dim, 1.0f, out);
}

void attend_gqa(const AttendGqaArgs& args) {
  for (int64_t row = 0; row < args.num_rows; row += kQueryTile) {
    const int64_t left = args.num_rows - row;
    if (left == 1) {
      attend_gqa_rows<1>(args, row);
    } else if (left == 2) {
      attend_gqa_rows<2>(args, row);
    } else {
      attend_gqa_rows<kQueryTile>(args, row);
    }
  }
}

}  // namespace
}  // namespace rodin
