// Attention over one tile of cached keys and values that were expanded when they were stored. Included by one
// translation unit per instruction path.
#pragma once

#include "ops/cpu/kernels_gqa.h"

namespace rodin {
namespace {

// Heads whose values are summed side by side: enough independent sums to hide an instruction's latency.
constexpr int kHeadGroup = 4;

// scores[j] of the keys first .. end - 1 for one query: nope parts begin at keys[j] + nope_at.
template <bool kHasTail>
inline void score_expanded(const AttendExpandedArgs& args, const float* q, int64_t nope_at, float* scores) {
  const float* const nope[1] = {q};                  // [1]
  const float* const rope[1] = {q + args.nope_dim};  // [1]
  for (int64_t j = args.first / kAccumulators * kAccumulators; j < args.end; j += kAccumulators) {
    const char* nope_keys[kAccumulators];  // [kAccumulators]
    const char* rope_keys[kAccumulators];  // [kAccumulators]
    for (int i = 0; i < kAccumulators; ++i) {
      nope_keys[i] = reinterpret_cast<const char*>(args.keys[j + i] + nope_at);
      rope_keys[i] = reinterpret_cast<const char*>(args.keys[j + i] + args.rope_at());
    }
    V part[kAccumulators][1];
    for (int i = 0; i < kAccumulators; ++i) part[i][0] = zero();
    dot_block<ReadCache, kHasTail, kAccumulators, 1>(nope_keys, nope, 0, args.nope_dim, part);
    dot_block<ReadCache, kHasTail, kAccumulators, 1>(rope_keys, rope, 0, args.rope_dim, part);
    V sums[kAccumulators];
    for (int i = 0; i < kAccumulators; ++i) sums[i] = part[i][0];
    reduce(sums, scores + j);
  }
}

// The columns col .. of sum_j weights[h][j] * value_h(j) for R heads, C vectors of each; of a single last one
// only `left` columns exist.
template <int R, int C>
inline void mix_expanded(const AttendExpandedArgs& args, const float (*weights)[kKeyTile], int64_t head,
                         int64_t col, int64_t left) {
  V acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  }
  const int64_t at = args.value_at() + head * args.v_dim + col;
  for (int64_t j = args.first; j < args.end; ++j) {
    const char* row = reinterpret_cast<const char*>(args.keys[j] + at);
    for (int r = 0; r < R; ++r) {
      const V by = set1(weights[r][j]);
      for (int c = 0; c < C; ++c) {
        const char* from = row + (r * args.v_dim + c * kLanes) * ReadCache::kBytes;
        const V wide = left < kLanes ? read_tail<ReadCache>(from, left) : ReadCache::read(from);
        acc[r][c] = fma(by, wide, acc[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float* to = args.out + (head + r) * args.v_dim + col;
    for (int c = 0; c < C; ++c) {
      if (left < kLanes) {
        store_tail(to, acc[r][c], left);
      } else {
        store(to + c * kLanes, acc[r][c]);
      }
    }
  }
}

template <int R>
inline void attend_expanded_heads(const AttendExpandedArgs& args, int64_t head) {
  float weights[R][kKeyTile];  // [R, kKeyTile]
  for (int r = 0; r < R; ++r) {
    const float* q = args.q + (head + r) * (args.nope_dim + args.rope_dim);
    const int64_t nope_at = (head + r) * args.nope_dim;
    if (args.nope_dim % kLanes == 0 && args.rope_dim % kLanes == 0) {
      score_expanded<false>(args, q, nope_at, weights[r]);
    } else {
      score_expanded<true>(args, q, nope_at, weights[r]);
    }
    for (int64_t j = args.first; j < args.end; ++j) weights[r][j] *= args.scale;
    softmax_tile(weights[r], args.first, args.end, args.max + head + r, args.sum + head + r);
  }
  constexpr int C = kAccumulators / R;
  int64_t col = 0;
  for (; col + C * kLanes <= args.v_dim; col += C * kLanes) mix_expanded<R, C>(args, weights, head, col, kLanes);
  for (; col < args.v_dim; col += kLanes) {
    mix_expanded<R, 1>(args, weights, head, col, min_of(kLanes, args.v_dim - col));
  }
}

void attend_expanded(const AttendExpandedArgs& args) {
  int64_t head = 0;
  for (; head + kHeadGroup <= args.num_heads; head += kHeadGroup) {
    attend_expanded_heads<kHeadGroup>(args, head);
  }
  for (; head < args.num_heads; ++head) attend_expanded_heads<1>(args, head);
}

}  // namespace
}  // namespace rodin
