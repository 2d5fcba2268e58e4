// Attention over one tile of keys and values that were expanded when they were stored, in bf16: queries and
// softmax weights are rounded to bf16 too, sums are float32. Included by the units that have AVX512-BF16.
#pragma once

#include "ops/cpu/kernels_bf16_attention.h"
#include "ops/cpu/kernels_expanded.h"

namespace rodin {
namespace {

// part[i] += key_i . q over `dim` elements; q has zeros after the last.
template <int K>
inline void dot_part(const uint16_t* const* keys, int64_t at, const uint16_t* q, int64_t dim, RowFetcher& next,
                     V* part) {
  for (int64_t k = 0; k < dim; k += kPairLanes) {
    const auto query = (__m512bh)_mm512_loadu_si512(q + k);
    next.fetch(K / 2);
    if (dim - k >= kPairLanes) {
      for (int i = 0; i < K; ++i) {
        part[i] = _mm512_dpbf16_ps(part[i], (__m512bh)_mm512_loadu_si512(keys[i] + at + k), query);
      }
    } else {
      for (int i = 0; i < K; ++i) {
        part[i] = _mm512_dpbf16_ps(part[i], (__m512bh)load_part_bf16(keys[i] + at + k, dim - k), query);
      }
    }
  }
}

// The columns col .. col + 32 C - 1 of sum_j p_j value_h(j) for R heads; of a single last vector only `left`
// exist. Keys come in pairs, from an even j on.
template <int R, int C>
inline void mix_value_pairs(const AttendExpandedArgs& args, const uint32_t (*pairs)[kKeyTile / 2], int64_t head,
                            int64_t col, int64_t left, RowFetcher& next) {
  V low[R][C], high[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) low[r][c] = high[r][c] = zero();
  }
  const int64_t at = args.value_at() + head * args.v_dim + col;
  for (int64_t j = args.first / 2 * 2; j < args.end; j += 2) {
    const uint16_t* even = args.keys[j] + at;
    const uint16_t* odd = args.keys[j + 1] + at;
    next.fetch(R * C);
    for (int r = 0; r < R; ++r) {
      const auto by = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[r][j / 2]));
      for (int c = 0; c < C; ++c) {
        const int64_t from = r * args.v_dim + c * kPairLanes;
        const __m512i first = load_bf16_row(even + from, left);
        const __m512i second = load_bf16_row(odd + from, left);
        low[r][c] = _mm512_dpbf16_ps(low[r][c], (__m512bh)_mm512_unpacklo_epi16(first, second), by);
        high[r][c] = _mm512_dpbf16_ps(high[r][c], (__m512bh)_mm512_unpackhi_epi16(first, second), by);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      store_mixed(low[r][c], high[r][c], left, args.out + (head + r) * args.v_dim + col + c * kPairLanes);
    }
  }
}

// scratch: [R, nope_dim rounded up + rope_dim rounded up] for the rounded queries.
template <int R>
inline void attend_expanded_heads_bf16(const AttendExpandedArgs& args, int64_t head, RowFetcher& next) {
  constexpr int kKeys = kAccumulators;
  alignas(64) float scores[R][kKeyTile];        // [R, kKeyTile]
  alignas(64) uint32_t pairs[R][kKeyTile / 2];  // [R, kKeyTile / 2] softmax weights of two keys
  const int64_t nope_stride = ceil_div(args.nope_dim, kPairLanes) * kPairLanes;
  const int64_t stride = nope_stride + ceil_div(args.rope_dim, kPairLanes) * kPairLanes;
  for (int r = 0; r < R; ++r) {
    const float* q = args.q + (head + r) * (args.nope_dim + args.rope_dim);
    to_bf16(q, args.nope_dim, args.scratch + r * stride);
    to_bf16(q + args.nope_dim, args.rope_dim, args.scratch + r * stride + nope_stride);
  }
  for (int64_t j = args.first / kKeys * kKeys; j < args.end; j += kKeys) {
    for (int r = 0; r < R; ++r) {
      const uint16_t* q = args.scratch + r * stride;
      V part[kKeys];
      for (V& sum : part) sum = zero();
      dot_part<kKeys>(args.keys + j, (head + r) * args.nope_dim, q, args.nope_dim, next, part);
      dot_part<kKeys>(args.keys + j, args.rope_at(), q + nope_stride, args.rope_dim, next, part);
      reduce(part, scores[r] + j);
      store(scores[r] + j, mul(load(scores[r] + j), set1(args.scale)));
    }
  }
  for (int r = 0; r < R; ++r) {
    softmax_pairs(scores[r], args.first, args.end, pairs[r], args.max + head + r, args.sum + head + r);
  }
  constexpr int C = R == 1 ? 2 : 8 / R;
  int64_t col = 0;
  for (; col + C * kPairLanes <= args.v_dim; col += C * kPairLanes) {
    mix_value_pairs<R, C>(args, pairs, head, col, kPairLanes, next);
  }
  for (; col < args.v_dim; col += kPairLanes) {
    mix_value_pairs<R, 1>(args, pairs, head, col, min_of(kPairLanes, args.v_dim - col), next);
  }
}

void attend_expanded_bf16(const AttendExpandedArgs& args) {
  RowFetcher next(args.next_keys, args.row_dim());
  int64_t head = 0;
  for (; head + kHeadGroup <= args.num_heads; head += kHeadGroup) {
    attend_expanded_heads_bf16<kHeadGroup>(args, head, next);
  }
  for (; head < args.num_heads; ++head) attend_expanded_heads_bf16<1>(args, head, next);
  next.fetch_rest();
}

}  // namespace
}  // namespace rodin
