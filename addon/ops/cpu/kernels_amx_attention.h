// Absorbed attention over one tile of latents for up to 16 heads of one token, by AMX tiles:
//   scores^T [keys, heads] = keys . q^T: rows of the cache are tiles as they lie there; q^T is transposed
//   once weights  softmax over the keys, down the columns, rounded to bf16 in pairs of keys, transposed out
//   [heads, 32 columns at a time] = weights . values, of which pairs of rows are interleaved
// A key outside first .. end - 1 has the weight 0; what its row gives for a score is not looked at.
#pragma once

#include "ops/cpu/kernels_attention.h"
#include "ops/cpu/kernels_bf16_attention.h"
#include "ops/cpu/tile_ops.h"

namespace rodin {
namespace {

constexpr int64_t kTileHeads = 16;
constexpr int64_t kKeyGroups = kKeyTile / kTileRows;

// Row i of the result has element i of each row.
inline void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// The queries, rounded, as tiles of 16 pairs of inputs by 16 heads; zeros for what there is not.
[[gnu::noinline]] void transpose_queries(const AttendArgs& args) {
  const int64_t steps = ceil_div(args.latent_dim, kTileInputs);
  const auto mask_of = [](int64_t left) {
    return static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1);
  };
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t k = step * kTileInputs, left = args.latent_dim - k;
    __m512i rows[16];
    for (int64_t h = 0; h < kTileHeads; ++h) {
      if (h >= args.num_rows) {
        rows[h] = _mm512_setzero_si512();
        continue;
      }
      const V low = _mm512_maskz_loadu_ps(mask_of(left), args.q[h] + k);
      const V high = _mm512_maskz_loadu_ps(mask_of(left - 16), args.q[h] + k + 16);
      rows[h] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    transpose16(rows);
    char* to = reinterpret_cast<char*>(args.scratch) + step * kTileBytes;
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, rows[i]);
  }
}

// 16 keys as rows that a tile can load: as they lie in the cache, or where that has not all of them one after
// another, those that there are copied to `copies`. Returns the first row, and the bytes from one to the
// next.
inline const char* key_rows(const AttendArgs& args, int64_t group, char* copies, int64_t& row_bytes) {
  const int64_t begin = group * kTileRows;
  const uint16_t* const* keys = args.keys + begin;
  const int64_t first = args.first > begin ? args.first - begin : 0,
                end = min_of(args.end - begin, kTileRows);
  if (first >= end) {  // no key: whatever there is, once for each row
    row_bytes = 0;
    return reinterpret_cast<const char*>(args.scratch);
  }
  row_bytes = (keys[1] - keys[0]) * 2;
  bool in_line = args.latent_dim % kTileInputs == 0 && first == 0 && end == kTileRows;
  for (int64_t j = 1; j < kTileRows && in_line; ++j) in_line = keys[j] - keys[0] == j * (keys[1] - keys[0]);
  if (in_line) return reinterpret_cast<const char*>(keys[0]);
  row_bytes = ceil_div(args.latent_dim, kTileInputs) * 64;
  for (int64_t j = first; j < end; ++j) {
    for (int64_t k = 0; k < args.latent_dim; k += kPairLanes) {
      _mm512_store_si512(copies + j * row_bytes + k * 2, load_bf16_row(keys[j] + k, args.latent_dim - k));
    }
  }
  return copies;
}

// Scores of the keys: [keys, heads].
using TileScores = float[kKeyTile][kTileHeads];

[[gnu::noinline]] void score_tile(const AttendArgs& args, RowFetcher& next, TileScores& scores) {
  const int64_t steps = ceil_div(args.latent_dim, kTileInputs);
  auto* copies = reinterpret_cast<char*>(args.scratch) + steps * kTileBytes;  // [kKeyTile, steps * 64]
  const char* rows[kKeyGroups];                                               // [kKeyGroups]
  int64_t row_bytes[kKeyGroups];                                              // [kKeyGroups]
  for (int64_t group = 0; group < kKeyGroups; ++group) {
    rows[group] = key_rows(args, group, copies + group * steps * kTileBytes, row_bytes[group]);
  }
  TILE_FENCE();
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t step = 0; step < steps; ++step) {
    next.fetch(2 * kKeyTile / 3);  // about half of them here
    TILE_LOAD(4, reinterpret_cast<const char*>(args.scratch) + step * kTileBytes, 64);
    TILE_LOAD(5, rows[0] + step * 64, row_bytes[0]);
    TILE_MULTIPLY(0, 5, 4);
    TILE_LOAD(6, rows[1] + step * 64, row_bytes[1]);
    TILE_MULTIPLY(1, 6, 4);
    TILE_LOAD(7, rows[2] + step * 64, row_bytes[2]);
    TILE_MULTIPLY(2, 7, 4);
    TILE_LOAD(5, rows[3] + step * 64, row_bytes[3]);
    TILE_MULTIPLY(3, 5, 4);
  }
  TILE_STORE(0, scores[0], 64);
  TILE_STORE(1, scores[kTileRows], 64);
  TILE_STORE(2, scores[2 * kTileRows], 64);
  TILE_STORE(3, scores[3 * kTileRows], 64);
}

// Softmax weights as two tiles of 16 heads by 32 keys; the rows' maxima and sums.
[[gnu::noinline]] void weigh_tile(const AttendArgs& args, const TileScores& scores, char* weights) {
  V row_max = load(scores[args.first]), sum = zero();
  for (int64_t j = args.first + 1; j < args.end; ++j) row_max = max(row_max, load(scores[j]));
  for (int64_t half = 0; half < 2; ++half) {
    __m512i pairs[16];
    for (int64_t i = 0; i < 16; ++i) {
      __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t odd = 0; odd < 2; ++odd) {
        const int64_t j = half * kTileInputs + 2 * i + odd;
        if (j < args.first || j >= args.end) continue;
        const auto rounded = (__m256i)_mm512_cvtneps_pbh(exp(sub(load(scores[j]), row_max)));
        both[odd] = _mm512_cvtepu16_epi32(rounded);
        // What is summed is what is multiplied, so that the weights add up to one.
        sum = add(sum, _mm512_castsi512_ps(_mm512_slli_epi32(both[odd], 16)));
      }
      pairs[i] = _mm512_or_si512(both[0], _mm512_slli_epi32(both[1], 16));
    }
    transpose16(pairs);
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(weights + half * kTileBytes + i * 64, pairs[i]);
  }
  const auto rows = static_cast<__mmask16>(args.num_rows >= 16 ? 0xffff : (1u << args.num_rows) - 1);
  _mm512_mask_storeu_ps(args.max, rows, row_max);
  _mm512_mask_storeu_ps(args.sum, rows, sum);
}

// The columns col .. col + 31 of the values, of which `left` exist, as tiles [2 halves of keys][2]: the first
// of the two has of every 8 columns the lower 4. Rows outside first .. end - 1 stand for one inside.
inline void interleave_values(const AttendArgs& args, int64_t col, int64_t left, char* tiles) {
  for (int64_t j = 0; j < kKeyTile; j += 2) {
    const __m512i even = load_bf16_row(args.keys[j] + col, left);
    const __m512i odd = load_bf16_row(args.keys[j + 1] + col, left);
    char* to = tiles + j / kTileInputs * 2 * kTileBytes + j % kTileInputs / 2 * 64;
    _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(to + kTileBytes, _mm512_unpackhi_epi16(even, odd));
  }
}

[[gnu::noinline]] void mix_tile(const AttendArgs& args, RowFetcher& next, const char* weights) {
  alignas(64) char tiles[2][4 * kTileBytes];            // [2 in turns, 2 halves of keys, 2]
  alignas(64) float sums[2][2][kTileHeads][kTileRows];  // [2 in turns, 2, heads, columns]
  const int64_t cols = args.lora_rank;
  const auto take = [&](int64_t col, int turn) {
    for (int64_t h = 0; h < args.num_rows; ++h) {
      store_mixed(load(sums[turn][0][h]), load(sums[turn][1][h]), cols - col, args.out[h] + col);
    }
  };
  TILE_LOAD(4, weights, 64);
  TILE_LOAD(5, weights + kTileBytes, 64);
  int turn = 0;
  interleave_values(args, 0, cols, tiles[0]);
  for (int64_t col = 0; col < cols; col += kPairLanes, turn ^= 1) {
    TILE_FENCE();
    next.fetch(kKeyTile);
    const char* values = tiles[turn];
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_LOAD(6, values, 64);
    TILE_MULTIPLY(0, 4, 6);
    TILE_LOAD(7, values + kTileBytes, 64);
    TILE_MULTIPLY(1, 4, 7);
    TILE_LOAD(6, values + 2 * kTileBytes, 64);
    TILE_MULTIPLY(0, 5, 6);
    TILE_LOAD(7, values + 3 * kTileBytes, 64);
    TILE_MULTIPLY(1, 5, 7);
    // Meanwhile the columns after these, and those before.
    if (col + kPairLanes < cols) {
      interleave_values(args, col + kPairLanes, cols - col - kPairLanes, tiles[turn ^ 1]);
    }
    if (col > 0) take(col - kPairLanes, turn ^ 1);
    TILE_STORE(0, sums[turn][0][0], 64);
    TILE_STORE(1, sums[turn][1][0], 64);
  }
  take((ceil_div(cols, kPairLanes) - 1) * kPairLanes, turn ^ 1);
}

void attend_amx(const AttendArgs& args) {
  const DenormalsAreZero mode;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = kTileRows;
    config.row_bytes[tile] = 64;
  }
  TILE_CONFIG(&config);
  alignas(64) TileScores scores;
  alignas(64) char weights[2 * kTileBytes];
  RowFetcher next(args.next_keys, args.latent_dim);
  if (!args.has_queries) transpose_queries(args);
  score_tile(args, next, scores);
  weigh_tile(args, scores, weights);
  TILE_FENCE();
  mix_tile(args, next, weights);
  next.fetch_rest();
  TILE_RELEASE();
}

}  // namespace
}  // namespace rodin
