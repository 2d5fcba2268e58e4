// Absorbed attention over one tile of cached latents. Included by one translation unit per instruction path.
#pragma once

#include "ops/cpu/kernels_linear.h"

namespace rodin {
namespace {

// The largest score of the keys first .. end - 1; the others become -inf.
inline float largest_score(float* scores, int64_t first, int64_t end) {
  for (int64_t j = 0; j < first; ++j) scores[j] = -__builtin_inff();
  for (int64_t j = end; j < kKeyTile; ++j) scores[j] = -__builtin_inff();
  V largest = load(scores);
  for (int64_t j = kLanes; j < kKeyTile; j += kLanes) largest = max(largest, load(scores + j));
  return hmax(largest);
}

template <int R>
inline void attend_rows(const AttendArgs& args) {
  constexpr int kKeys = kAccumulators / R;
  const float* q[R];          // [R]
  float* out[R];              // [R]
  float scores[R][kKeyTile];  // [R, kKeyTile]
  for (int r = 0; r < R; ++r) {
    const int64_t row = min_of(r, args.num_rows - 1);  // a row past the end repeats the last one
    q[r] = args.q[row];
    out[r] = args.out[row];
  }
  for (int64_t j = args.first / kKeys * kKeys; j < args.end; j += kKeys) {
    const char* keys[kKeys];  // [kKeys]
    for (int i = 0; i < kKeys; ++i) {
      const int64_t key = j + i < args.first ? args.first : min_of(j + i, args.end - 1);
      keys[i] = reinterpret_cast<const char*>(args.keys[key]);
    }
    V sums[kAccumulators];
    dot_tile<ReadCache, false, kKeys, R>(keys, nullptr, 1.0f, q, args.latent_dim, args.latent_dim, sums);
    float results[kAccumulators];  // [kKeys, R]
    reduce(sums, results);
    for (int i = 0; i < kKeys; ++i) {
      for (int r = 0; r < R; ++r) scores[r][j + i] = results[i * R + r];
    }
  }
  for (int r = 0; r < R; ++r) {
    const float row_max = largest_score(scores[r], args.first, args.end);
    V sum = zero();
    for (int64_t j = 0; j < kKeyTile; j += kLanes) {
      store(scores[r] + j, exp(sub(load(scores[r] + j), set1(row_max))));
    }
    for (int64_t j = 0; j < args.first; ++j) scores[r][j] = 0.0f;
    for (int64_t j = args.end; j < kKeyTile; ++j) scores[r][j] = 0.0f;
    for (int64_t j = 0; j < kKeyTile; j += kLanes) sum = add(sum, load(scores[r] + j));
    const int64_t row = min_of(r, args.num_rows - 1);
    args.max[row] = row_max;
    args.sum[row] = hsum(sum);
  }
  const float* weights[R];  // [R] rows of [kKeyTile]
  for (int r = 0; r < R; ++r) weights[r] = scores[r];
  const auto row_of = [&](int64_t j) { return reinterpret_cast<const char*>(args.keys[j]); };
  mix_columns<ReadCache, R>(weights, row_of, args.first, args.end, 0, args.lora_rank, 1.0f, out);
}

void attend(const AttendArgs& args) {
  if (args.num_rows == 1) return attend_rows<1>(args);
  if (args.num_rows == 2) return attend_rows<2>(args);
  attend_rows<4>(args);
}

void combine(float* out, float* max, float* sum, const float* part, float part_max, float part_sum,
             int64_t n) {
  const float new_max = *max > part_max ? *max : part_max;
  const float keep = exp_scalar(*max - new_max);
  const float take = exp_scalar(part_max - new_max);
  const V keep_v = set1(keep);
  const V take_v = set1(take);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(out + i, fma(take_v, load(part + i), mul(keep_v, load(out + i))));
  if (i < n) {
    const V result = fma(take_v, load_tail(part + i, n - i), mul(keep_v, load_tail(out + i, n - i)));
    store_tail(out + i, result, n - i);
  }
  *sum = take * part_sum + keep * *sum;
  *max = new_max;
}

}  // namespace
}  // namespace rodin
