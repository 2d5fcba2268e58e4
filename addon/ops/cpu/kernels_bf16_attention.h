// Absorbed attention over one tile of latents cached in bf16: queries and softmax weights are rounded to bf16
// too, sums are float32. Included by the units that have AVX512-BF16.
#pragma once

#include "ops/cpu/kernels_attention.h"
#include "ops/cpu/kernels_bf16.h"

namespace rodin {
namespace {

constexpr int64_t kPairLanes = 32;  // bf16 of a vector

// n < 32 elements, zeros after.
inline __m512i load_part_bf16(const uint16_t* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
}
inline __m512i load_bf16_row(const uint16_t* p, int64_t left) {
  return left >= kPairLanes ? _mm512_loadu_si512(p) : load_part_bf16(p, left);
}

// Asks for the rows of a tile line after line, a few at a time between products: in the order of addresses
// where rows follow one another, which is what a core's own prefetching takes up.
class RowFetcher {
 public:
  // No rows: asks for nothing.
  RowFetcher(const uint16_t* const* rows, int64_t dim) : rows_(rows), dim_(dim) {
    if (rows) num_left_ = kKeyTile * ceil_div(dim, kPairLanes);
  }
  void fetch(int64_t num_lines) {
    for (; num_lines > 0 && num_left_ > 0; --num_lines, --num_left_, at_ += kPairLanes) {
      if (at_ >= dim_) {
        at_ = 0;
        ++rows_;
      }
      _mm_prefetch(reinterpret_cast<const char*>(*rows_ + at_), _MM_HINT_T1);
    }
  }
  void fetch_rest() { fetch(num_left_); }

 private:
  const uint16_t* const* rows_;
  const int64_t dim_;
  int64_t at_ = 0;        // of the row
  int64_t num_left_ = 0;  // lines
};

// sums[i * R + r] = lane sums of keys[i] . q[r]
template <int K, int R>
inline void dot_keys(const uint16_t* const* keys, RowFetcher& next, const uint16_t* const* q, int64_t dim,
                     V* sums) {
  V part[K][R];
  for (int i = 0; i < K; ++i) {
    for (int r = 0; r < R; ++r) part[i][r] = zero();
  }
  int64_t k = 0;
  for (; k + kPairLanes <= dim; k += kPairLanes) {
    __m512bh query[R];
    for (int r = 0; r < R; ++r) query[r] = (__m512bh)_mm512_load_si512(q[r] + k);
    next.fetch(K / 2);
    for (int i = 0; i < K; ++i) {
      const auto key = (__m512bh)_mm512_loadu_si512(keys[i] + k);
      for (int r = 0; r < R; ++r) part[i][r] = _mm512_dpbf16_ps(part[i][r], key, query[r]);
    }
  }
  if (k < dim) {
    for (int i = 0; i < K; ++i) {
      const auto key = (__m512bh)load_part_bf16(keys[i] + k, dim - k);
      for (int r = 0; r < R; ++r) {
        part[i][r] = _mm512_dpbf16_ps(part[i][r], key, (__m512bh)_mm512_load_si512(q[r] + k));
      }
    }
  }
  for (int i = 0; i < K; ++i) {
    for (int r = 0; r < R; ++r) sums[i * R + r] = part[i][r];
  }
}

// 32 columns in order, of which the first `left` exist, from what mix_pairs has summed: quarter i of `low`
// holds the columns 8 i .. 8 i + 3, of `high` the four after them.
inline void store_mixed(V low, V high, int64_t left, float* to) {
  const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i upper = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const auto mask = static_cast<uint32_t>(left >= kPairLanes ? 0xffffffffu : (uint64_t{1} << left) - 1);
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), _mm512_permutex2var_ps(low, lower, high));
  _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(mask >> 16),
                        _mm512_permutex2var_ps(low, upper, high));
}

// pairs[j / 2] = exp(scores[j] - *row_max) of two keys in bf16, 0 outside first .. end - 1; *row_sum is their
// sum.
inline void softmax_pairs(float* scores, int64_t first, int64_t end, uint32_t* pairs, float* row_max,
                          float* row_sum) {
  *row_max = largest_score(scores, first, end);
  V sum = zero();
  for (int64_t j = 0; j < kKeyTile; j += kLanes) {
    const auto inside =
        static_cast<__mmask16>(((uint64_t{1} << (end - 1) << 1) - (uint64_t{1} << first)) >> j);
    const V weight = _mm512_maskz_mov_ps(inside, exp(sub(load(scores + j), set1(*row_max))));
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(weight);
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs + j / 2), rounded);
    // What is summed is what is multiplied, so that the weights add up to one.
    sum = add(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
  }
  *row_sum = hsum(sum);
}

// The columns col .. col + 32 C - 1 of sum_j p_j key_j for R rows; of the last 32 only `left` exist where it
// is less. Keys come in pairs, from an even j on.
template <int R, int C>
inline void mix_pairs(const uint32_t (*pairs)[kKeyTile / 2], const uint16_t* const* keys, int64_t begin,
                      int64_t end, int64_t col, int64_t left, RowFetcher& next, float* const* out) {
  V low[R][C], high[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) low[r][c] = high[r][c] = zero();
  }
  for (int64_t j = begin; j < end; j += 2) {
    __m512bh by[R];
    for (int r = 0; r < R; ++r) by[r] = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[r][j / 2]));
    next.fetch(C);
    for (int c = 0; c < C; ++c) {
      const __m512i even = load_bf16_row(keys[j] + col + c * kPairLanes, left);
      const __m512i odd = load_bf16_row(keys[j + 1] + col + c * kPairLanes, left);
      const auto first = (__m512bh)_mm512_unpacklo_epi16(even, odd);
      const auto second = (__m512bh)_mm512_unpackhi_epi16(even, odd);
      for (int r = 0; r < R; ++r) low[r][c] = _mm512_dpbf16_ps(low[r][c], first, by[r]);
      for (int r = 0; r < R; ++r) high[r][c] = _mm512_dpbf16_ps(high[r][c], second, by[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store_mixed(low[r][c], high[r][c], left, out[r] + col + c * kPairLanes);
  }
}

template <int R>
inline void attend_rows_bf16(const AttendArgs& args) {
  constexpr int kKeys = kAccumulators / R;
  const int64_t stride = ceil_div(args.latent_dim, kPairLanes) * kPairLanes;
  const uint16_t* q[R];                         // [R]
  float* out[R];                                // [R]
  alignas(64) float scores[R][kKeyTile];        // [R, kKeyTile]
  alignas(64) uint32_t pairs[R][kKeyTile / 2];  // [R, kKeyTile / 2] softmax weights of two keys
  for (int r = 0; r < R; ++r) {
    const int64_t row = min_of(r, args.num_rows - 1);  // a row past the end repeats the last one
    uint16_t* rounded = args.scratch + r * stride;
    to_bf16(args.q[row], args.latent_dim, rounded);
    q[r] = rounded;
    out[r] = args.out[row];
  }
  const uint16_t* const* keys = args.keys;
  RowFetcher next(args.next_keys, args.latent_dim);
  for (int64_t j = args.first / kKeys * kKeys; j < args.end; j += kKeys) {
    V sums[kAccumulators];
    dot_keys<kKeys, R>(keys + j, next, q, args.latent_dim, sums);
    float results[kAccumulators];  // [kKeys, R]
    reduce(sums, results);
    for (int i = 0; i < kKeys; ++i) {
      for (int r = 0; r < R; ++r) scores[r][j + i] = results[i * R + r];
    }
  }
  for (int r = 0; r < R; ++r) {
    const int64_t row = min_of(r, args.num_rows - 1);
    softmax_pairs(scores[r], args.first, args.end, pairs[r], args.max + row, args.sum + row);
  }
  const int64_t begin = args.first / 2 * 2;
  constexpr int C = R == 4 ? 2 : 4;
  int64_t col = 0;
  for (; col + C * kPairLanes <= args.lora_rank; col += C * kPairLanes) {
    mix_pairs<R, C>(pairs, keys, begin, args.end, col, kPairLanes, next, out);
  }
  for (; col < args.lora_rank; col += kPairLanes) {
    mix_pairs<R, 1>(pairs, keys, begin, args.end, col, min_of(kPairLanes, args.lora_rank - col), next, out);
  }
  next.fetch_rest();
}

[[maybe_unused]] void attend_bf16(const AttendArgs& args) {
  if (args.num_rows == 1) return attend_rows_bf16<1>(args);
  if (args.num_rows == 2) return attend_rows_bf16<2>(args);
  attend_rows_bf16<4>(args);
}

}  // namespace
}  // namespace rodin
