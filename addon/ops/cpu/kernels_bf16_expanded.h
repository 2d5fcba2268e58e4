// Attention over one tile of keys and values that were expanded when they were stored, in bf16: queries and
// softmax weights are rounded to bf16 too, sums are float32. Groups of 16 keys are kept as vdpbf16ps takes
// them: pairs of elements [(A * nope_dim + rope_dim) / 2, 16 keys, 2], then pairs of keys [8, A * v_dim, 2].
// Included by the units that have AVX512-BF16.
#pragma once

#include "ops/cpu/kernels_bf16_attention.h"
#include "ops/cpu/kernels_expanded.h"

namespace rodin {
namespace {

// As one type: converting between vector types makes the compiler go through memory.
typedef __m512bh BfVector __attribute__((aligned(2), may_alias));
inline __m512bh load_bf(const uint16_t* p) { return *reinterpret_cast<const BfVector*>(p); }

// Asks for the groups of a tile line after line, a few at a time between products.
class GroupFetcher {
 public:
  // No groups: asks for nothing.
  GroupFetcher(const uint16_t* const* groups, int64_t elements) : groups_(groups) {
    if (!groups) return;
    num_lines_ = ceil_div(elements, kPairLanes);
    num_groups_ = kTileGroups;
    next_group();
  }
  template <int N>
  void fetch() {
    if (num_left_ < N) return next_group();
    num_left_ -= N;
    for (int i = 0; i < N; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(at_ + i * kPairLanes), _MM_HINT_T1);
    at_ += N * kPairLanes;
  }

 private:
  void next_group() {
    if (num_groups_ == 0) {
      num_left_ = 0;
      return;
    }
    --num_groups_;
    at_ = *groups_++;
    num_left_ = num_lines_;
  }
  const uint16_t* const* groups_;
  const uint16_t* at_ = nullptr;
  int64_t num_left_ = 0;  // lines of the group
  int64_t num_lines_ = 0;
  int64_t num_groups_ = 0;
};

// sums[r][g] += q[r] . keys of group g < G over num_pairs pairs of elements from `at` on.
template <int R, int G>
inline void score_groups(const uint16_t* const* groups, int64_t at, const uint16_t* const* q,
                         int64_t num_pairs, GroupFetcher& next, V (*sums)[kTileGroups]) {
  const uint16_t* keys[G];  // [G]
  for (int g = 0; g < G; ++g) keys[g] = groups[g] + at;
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    next.fetch<4>();
    __m512bh elements[G];
    for (int g = 0; g < G; ++g) elements[g] = load_bf(keys[g] + pair * 2 * kKeyGroup);
    for (int r = 0; r < R; ++r) {
      const __m512bh by = pair_of(q[r] + 2 * pair);
      for (int g = 0; g < G; ++g) sums[r][g] = _mm512_dpbf16_ps(sums[r][g], elements[g], by);
    }
  }
}

// For the groups with keys before `end`.
template <int R>
inline void score_pairs(const AttendExpandedArgs& args, int64_t at, const uint16_t* const* q,
                        int64_t num_pairs, GroupFetcher& next, V (*sums)[kTileGroups]) {
  const auto groups = args.groups;
  if (args.end <= kKeyGroup) return score_groups<R, 1>(groups, at, q, num_pairs, next, sums);
  if (args.end <= 2 * kKeyGroup) return score_groups<R, 2>(groups, at, q, num_pairs, next, sums);
  if (args.end <= 3 * kKeyGroup) return score_groups<R, 3>(groups, at, q, num_pairs, next, sums);
  score_groups<R, 4>(groups, at, q, num_pairs, next, sums);
}

// Which elements of 16 columns of the keys j and j + 1 there are: `left` columns, and of a pair of keys of
// which one is outside first .. end - 1 the other.
inline uint32_t existing_pairs(const AttendExpandedArgs& args, int64_t j, int64_t left) {
  uint32_t exists = left >= kLanes ? 0xffffffffu : (1u << 2 * left) - 1;
  if (j < args.first) exists &= 0xaaaaaaaau;
  if (j + 2 > args.end) exists &= 0x55555555u;
  return exists;
}

// The columns col .. col + 16 C - 1 of sum_j p_j value_h(j) for R heads; of a single last vector only `left`
// exist. Of a pair of keys of which one is outside first .. end - 1, that one is not read.
template <int R, int C>
inline void mix_value_pairs(const AttendExpandedArgs& args, const uint32_t (*pairs)[kKeyTile / 2],
                            int64_t head, int64_t col, int64_t left, GroupFetcher& next) {
  V acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  }
  const int64_t v_dim = args.layout.v_dim;
  const int64_t at = args.layout.value_at() + 2 * (head * v_dim + col);
  for (int64_t j = args.first / 2 * 2; j < args.end; j += 2) {
    const uint16_t* values = args.groups[j / kKeyGroup] + at + j % kKeyGroup * args.layout.values();
    const bool is_whole = left >= kLanes && j >= args.first && j + 2 <= args.end;
    const uint32_t exists = existing_pairs(args, j, left);
    next.fetch<8>();
    for (int r = 0; r < R; ++r) {
      const auto by = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[r][j / 2]));
      for (int c = 0; c < C; ++c) {
        const uint16_t* from = values + 2 * (r * v_dim + c * kLanes);
        const __m512bh value = is_whole ? load_bf(from) : (__m512bh)_mm512_maskz_loadu_epi16(exists, from);
        acc[r][c] = _mm512_dpbf16_ps(acc[r][c], value, by);
      }
    }
  }
  const auto mask = static_cast<__mmask16>(left >= kLanes ? 0xffff : (1u << left) - 1);
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      _mm512_mask_storeu_ps(args.out + (head + r) * v_dim + col + c * kLanes, mask, acc[r][c]);
    }
  }
}

template <int R>
inline void attend_expanded_heads_bf16(const AttendExpandedArgs& args, int64_t head, GroupFetcher& next) {
  const ExpandedLayout& layout = args.layout;
  alignas(64) float scores[R][kKeyTile];        // [R, kKeyTile]
  alignas(64) uint32_t pairs[R][kKeyTile / 2];  // [R, kKeyTile / 2] softmax weights of two keys
  const int64_t nope_stride = ceil_div(layout.nope_dim, kPairLanes) * kPairLanes;
  const int64_t stride = nope_stride + ceil_div(layout.rope_dim, kPairLanes) * kPairLanes;
  const uint16_t* rope[R];  // [R]
  V sums[R][kTileGroups];
  for (int r = 0; r < R; ++r) {
    const float* q = args.q + (head + r) * (layout.nope_dim + layout.rope_dim);
    uint16_t* nope = args.scratch + r * stride;
    to_bf16(q, layout.nope_dim, nope);
    to_bf16(q + layout.nope_dim, layout.rope_dim, nope + nope_stride);
    rope[r] = nope + nope_stride;
    for (V& sum : sums[r]) sum = zero();
  }
  for (int r = 0; r < R; ++r) {
    const uint16_t* const nope[1] = {args.scratch + r * stride};  // [1]
    score_pairs<1>(args, layout.nope_at(head + r), nope, layout.nope_room() / 2, next, sums + r);
  }
  score_pairs<R>(args, layout.rope_at(), rope, layout.rope_dim / 2, next, sums);
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < kTileGroups; ++g) store(scores[r] + g * kKeyGroup, sums[r][g]);
    softmax_pairs(scores[r], args.first, args.end, pairs[r], args.max + head + r, args.sum + head + r);
  }
  constexpr int C = R == 1 ? 8 : 4;
  int64_t col = 0;
  for (; col + C * kLanes <= layout.v_dim; col += C * kLanes) {
    mix_value_pairs<R, C>(args, pairs, head, col, kLanes, next);
  }
  for (; col < layout.v_dim; col += kLanes) {
    mix_value_pairs<R, 1>(args, pairs, head, col, min_of(kLanes, layout.v_dim - col), next);
  }
}

void attend_expanded_bf16(const AttendExpandedArgs& args) {
  GroupFetcher next(args.next_groups, kKeyGroup * args.layout.row_dim());
  int64_t head = 0;
  for (; head + kHeadGroup <= args.layout.num_heads; head += kHeadGroup) {
    attend_expanded_heads_bf16<kHeadGroup>(args, head, next);
  }
  for (; head < args.layout.num_heads; ++head) attend_expanded_heads_bf16<1>(args, head, next);
}

// Two tokens' mix_value_pairs; a pair of keys that both attend to whole is read once.
template <int R, int C>
inline void mix_value_pairs_of_two(const AttendExpandedArgs* const* tokens,
                                   const uint32_t (*pairs)[kKeyTile / 2], int64_t head, int64_t col,
                                   int64_t left, GroupFetcher& next) {
  const AttendExpandedArgs& later = *tokens[1];
  V acc[R][2][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][0][c] = acc[r][1][c] = zero();
  }
  const int64_t v_dim = later.layout.v_dim;
  const int64_t at = later.layout.value_at() + 2 * (head * v_dim + col);
  const auto weights = [&](int r, int t, int64_t j) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[2 * r + t][j / 2]));
  };
  for (int64_t j = later.first / 2 * 2; j < later.end; j += 2) {
    const uint16_t* values = later.groups[j / kKeyGroup] + at + j % kKeyGroup * later.layout.values();
    next.fetch<8>();
    if (left >= kLanes && j >= later.first && j + 2 <= tokens[0]->end) {
      for (int r = 0; r < R; ++r) {
        const __m512bh by[2] = {weights(r, 0, j), weights(r, 1, j)};  // [2]
        for (int c = 0; c < C; ++c) {
          const __m512bh value = load_bf(values + 2 * (r * v_dim + c * kLanes));
          for (int t = 0; t < 2; ++t) acc[r][t][c] = _mm512_dpbf16_ps(acc[r][t][c], value, by[t]);
        }
      }
      continue;
    }
    for (int t = 0; t < 2; ++t) {
      if (j >= tokens[t]->end) continue;
      const uint32_t exists = existing_pairs(*tokens[t], j, left);
      for (int r = 0; r < R; ++r) {
        const __m512bh by = weights(r, t, j);
        for (int c = 0; c < C; ++c) {
          const uint16_t* from = values + 2 * (r * v_dim + c * kLanes);
          const auto value = (__m512bh)_mm512_maskz_loadu_epi16(exists, from);
          acc[r][t][c] = _mm512_dpbf16_ps(acc[r][t][c], value, by);
        }
      }
    }
  }
  const auto mask = static_cast<__mmask16>(left >= kLanes ? 0xffff : (1u << left) - 1);
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < 2; ++t) {
      float* to = tokens[t]->out + (head + r) * v_dim + col;
      for (int c = 0; c < C; ++c) _mm512_mask_storeu_ps(to + c * kLanes, mask, acc[r][t][c]);
    }
  }
}

// R heads of two tokens; row 2 r + t is head r of token t.
template <int R>
inline void attend_two_expanded_heads_bf16(const AttendExpandedArgs* const* tokens, int64_t head,
                                           GroupFetcher& next) {
  const AttendExpandedArgs& later = *tokens[1];
  const ExpandedLayout& layout = later.layout;
  alignas(64) float scores[2 * R][kKeyTile];        // [2 R, kKeyTile]
  alignas(64) uint32_t pairs[2 * R][kKeyTile / 2];  // [2 R, kKeyTile / 2]
  const int64_t nope_stride = ceil_div(layout.nope_dim, kPairLanes) * kPairLanes;
  const int64_t stride = nope_stride + ceil_div(layout.rope_dim, kPairLanes) * kPairLanes;
  const uint16_t* nope[2 * R];  // [2 R]
  const uint16_t* rope[2 * R];  // [2 R]
  V sums[2 * R][kTileGroups];
  for (int row = 0; row < 2 * R; ++row) {
    const float* q = tokens[row % 2]->q + (head + row / 2) * (layout.nope_dim + layout.rope_dim);
    uint16_t* rounded = later.scratch + row * stride;
    to_bf16(q, layout.nope_dim, rounded);
    to_bf16(q + layout.nope_dim, layout.rope_dim, rounded + nope_stride);
    nope[row] = rounded;
    rope[row] = rounded + nope_stride;
    for (V& sum : sums[row]) sum = zero();
  }
  for (int r = 0; r < R; ++r) {
    score_pairs<2>(later, layout.nope_at(head + r), nope + 2 * r, layout.nope_room() / 2, next, sums + 2 * r);
  }
  score_pairs<2 * R>(later, layout.rope_at(), rope, layout.rope_dim / 2, next, sums);
  for (int row = 0; row < 2 * R; ++row) {
    const AttendExpandedArgs& token = *tokens[row % 2];
    for (int g = 0; g < kTileGroups; ++g) store(scores[row] + g * kKeyGroup, sums[row][g]);
    softmax_pairs(scores[row], token.first, token.end, pairs[row], token.max + head + row / 2,
                  token.sum + head + row / 2);
  }
  constexpr int C = 4;
  int64_t col = 0;
  for (; col + C * kLanes <= layout.v_dim; col += C * kLanes) {
    mix_value_pairs_of_two<R, C>(tokens, pairs, head, col, kLanes, next);
  }
  for (; col < layout.v_dim; col += kLanes) {
    mix_value_pairs_of_two<R, 1>(tokens, pairs, head, col, min_of(kLanes, layout.v_dim - col), next);
  }
}

void attend_expanded_two_bf16(const AttendExpandedArgs& earlier, const AttendExpandedArgs& later) {
  const AttendExpandedArgs* const tokens[2] = {&earlier, &later};  // [2]
  GroupFetcher next(later.next_groups, kKeyGroup * later.layout.row_dim());
  int64_t head = 0;
  for (; head + 2 <= later.layout.num_heads; head += 2) attend_two_expanded_heads_bf16<2>(tokens, head, next);
  if (head < later.layout.num_heads) attend_two_expanded_heads_bf16<1>(tokens, head, next);
}

void group_key_bf16(const GroupKeyArgs& args) {
  const ExpandedLayout& layout = args.layout;
  const int64_t num_elements = layout.value_at() / kKeyGroup;
  uint16_t* pairs = args.group + 2 * args.lane;
  for (int64_t d = 0; d < num_elements; d += 2)
    memcpy(pairs + d * kKeyGroup, args.row + d, 2 * sizeof(uint16_t));
  const int64_t odd = args.lane % 2;
  uint16_t* values = args.group + layout.value_at() + (args.lane - odd) * layout.values() + odd;
  for (int64_t c = 0; c < layout.values(); ++c) values[2 * c] = args.row[num_elements + c];
}

}  // namespace
}  // namespace rodin
