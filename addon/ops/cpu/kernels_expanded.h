// Attention over one tile of keys and values that were expanded when they were stored. Included by one
// translation unit per instruction path. Groups of 16 keys are kept so that a vector is one element of
// several keys, and a score a lane: [A * nope_dim + rope_dim, 16 keys], then values [16 keys, A * v_dim].
#pragma once

#include "ops/cpu/kernels_elementwise.h"
#include "ops/cpu/kernels_gqa.h"

namespace rodin {
namespace {

// Heads whose values are summed side by side: enough independent sums to hide an instruction's latency.
constexpr int kHeadGroup = 4;
// Groups that are scored side by side, and the vectors that they take.
constexpr int kScoredGroups = kLanes / 4;
constexpr int64_t kGroupVectors = kKeyGroup / kLanes;

// sums[g][i] += sum_d q[d] * element d of the keys of group g, whose elements begin at `at`.
inline void score_part(const uint16_t* const* groups, int64_t at, const float* q, int64_t dim,
                       V (*sums)[kGroupVectors]) {
  for (int64_t d = 0; d < dim; ++d) {
    const V by = set1(q[d]);
    for (int g = 0; g < kScoredGroups; ++g) {
      const uint16_t* keys = groups[g] + at + d * kKeyGroup;
      for (int64_t i = 0; i < kGroupVectors; ++i) {
        const V wide = ReadCache::read(reinterpret_cast<const char*>(keys + i * kLanes));
        sums[g][i] = fma(wide, by, sums[g][i]);
      }
    }
  }
}

// Scores of all keys of the tile, those outside first .. end - 1 too, for one head.
inline void score_expanded(const AttendExpandedArgs& args, int64_t head, float* scores) {
  const ExpandedLayout& layout = args.layout;
  const float* q = args.q + head * (layout.nope_dim + layout.rope_dim);
  for (int group = 0; group < kTileGroups; group += kScoredGroups) {
    V sums[kScoredGroups][kGroupVectors];
    for (auto& of_group : sums) {
      for (V& sum : of_group) sum = zero();
    }
    score_part(args.groups + group, layout.nope_at(head), q, layout.nope_dim, sums);
    score_part(args.groups + group, layout.rope_at(), q + layout.nope_dim, layout.rope_dim, sums);
    for (int g = 0; g < kScoredGroups; ++g) {
      for (int64_t i = 0; i < kGroupVectors; ++i) {
        store(scores + (group + g) * kKeyGroup + i * kLanes, sums[g][i]);
      }
    }
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
  const int64_t v_dim = args.layout.v_dim;
  for (int64_t j = args.first; j < args.end; ++j) {
    const int64_t at = args.layout.value_at() + j % kKeyGroup * args.layout.values() + head * v_dim + col;
    const char* row = reinterpret_cast<const char*>(args.groups[j / kKeyGroup] + at);
    for (int r = 0; r < R; ++r) {
      const V by = set1(weights[r][j]);
      for (int c = 0; c < C; ++c) {
        const char* from = row + (r * v_dim + c * kLanes) * ReadCache::kBytes;
        const V wide = left < kLanes ? read_tail<ReadCache>(from, left) : ReadCache::read(from);
        acc[r][c] = fma(by, wide, acc[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float* to = args.out + (head + r) * v_dim + col;
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
    score_expanded(args, head + r, weights[r]);
    softmax_tile(weights[r], args.first, args.end, args.max + head + r, args.sum + head + r);
  }
  const int64_t v_dim = args.layout.v_dim;
  constexpr int C = kAccumulators / R;
  int64_t col = 0;
  for (; col + C * kLanes <= v_dim; col += C * kLanes) mix_expanded<R, C>(args, weights, head, col, kLanes);
  for (; col < v_dim; col += kLanes) {
    mix_expanded<R, 1>(args, weights, head, col, min_of(kLanes, v_dim - col));
  }
}

void attend_expanded(const AttendExpandedArgs& args) {
  int64_t head = 0;
  for (; head + kHeadGroup <= args.layout.num_heads; head += kHeadGroup) {
    attend_expanded_heads<kHeadGroup>(args, head);
  }
  for (; head < args.layout.num_heads; ++head) attend_expanded_heads<1>(args, head);
}

void group_key(const GroupKeyArgs& args) {
  const ExpandedLayout& layout = args.layout;
  const int64_t num_elements = layout.value_at() / kKeyGroup;
  for (int64_t d = 0; d < num_elements; ++d) args.group[d * kKeyGroup + args.lane] = args.row[d];
  uint16_t* values = args.group + layout.value_at() + args.lane * layout.values();
  memcpy(values, args.row + num_elements, static_cast<size_t>(layout.values()) * sizeof(uint16_t));
}

}  // namespace
}  // namespace rodin
