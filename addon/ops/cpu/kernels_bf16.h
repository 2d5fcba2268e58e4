// Products with FP8 and BF16 weights by vdpbf16ps. Inputs come rounded to bf16 and packed (see
// Kernels::pack); e4m3 is widened to bf16 by two table look-ups, exactly, denormals included: bf16 has the
// wider exponent, so that the instruction's flushing of denormals touches no weight. Included by the units
// that have AVX512-BF16 and VBMI.
#pragma once

#include "ops/cpu/kernels_linear.h"

namespace rodin {
namespace {

// The inputs of a packed group are in the order that interleaving the low and high bytes of 64 codes gives:
// of each quarter of 16, the first eight go to the first half, in order of quarters, the others to the
// second.
constexpr int64_t kGroup = kPackGroup;

// The two bytes of the bf16 that e4m3's magnitude bits stand for.
struct WideTable {
  alignas(64) uint8_t low[128];   // [128]
  alignas(64) uint8_t high[128];  // [128]
};
constexpr WideTable make_wide_table() {
  WideTable table = {};
  for (int code = 0; code < 128; ++code) {
    int exponent = code >> 3;
    int mantissa = code & 7;
    if (exponent == 0 && mantissa != 0) {
      for (exponent = 1; mantissa < 8; --exponent) mantissa *= 2;
      mantissa -= 8;
    }
    int bits = code == 0 ? 0 : ((exponent + 120) << 7) | (mantissa << 4);
    if (code == 0x7f) bits = 0x7fc0;
    table.low[code] = static_cast<uint8_t>(bits & 0xff);
    table.high[code] = static_cast<uint8_t>(bits >> 8);
  }
  return table;
}
constexpr WideTable kWideTable = make_wide_table();

// 64 weights as bf16, in the order of a packed group.
struct Wide {
  __m512bh first;
  __m512bh second;
};

class E4m3ToBf16 {
 public:
  static constexpr int64_t kBytes = 1;
  E4m3ToBf16()
      : low0_(_mm512_load_si512(kWideTable.low)),
        low1_(_mm512_load_si512(kWideTable.low + 64)),
        high0_(_mm512_load_si512(kWideTable.high)),
        high1_(_mm512_load_si512(kWideTable.high + 64)),
        sign_(_mm512_set1_epi8(static_cast<char>(0x80))) {}
  Wide read(const char* p) const { return widen(_mm512_loadu_si512(p)); }
  // n < 64 weights, zeros after.
  Wide read_tail(const char* p, int64_t n) const {
    return widen(_mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p));
  }

 private:
  Wide widen(__m512i codes) const {
    asm("" : "+v"(codes));  // loaded once: the compiler would rather load it for each use, which is slower
    const __m512i low = _mm512_permutex2var_epi8(low0_, codes, low1_);
    const __m512i high =
        _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(high0_, codes, high1_), codes, sign_, 0xf8);
    return {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
  }
  const __m512i low0_, low1_, high0_, high1_, sign_;
};

class Bf16ToBf16 {
 public:
  static constexpr int64_t kBytes = 2;
  Wide read(const char* p) const { return order(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)); }
  Wide read_tail(const char* p, int64_t n) const {
    const uint64_t mask = (uint64_t{1} << n) - 1;
    const auto first = static_cast<__mmask32>(mask);
    const auto second = static_cast<__mmask32>(mask >> 32);
    return order(_mm512_maskz_loadu_epi16(first, p), _mm512_maskz_loadu_epi16(second, p + 64));
  }

 private:
  static Wide order(__m512i a, __m512i b) {
    return {(__m512bh)_mm512_shuffle_i64x2(a, b, 0x88), (__m512bh)_mm512_shuffle_i64x2(a, b, 0xdd)};
  }
};

// Weights that widen_panel() has widened already; rows are whole groups.
class PanelToBf16 {
 public:
  static constexpr int64_t kBytes = 2;
  Wide read(const char* p) const {
    return {(__m512bh)_mm512_load_si512(p), (__m512bh)_mm512_load_si512(p + 64)};
  }
  Wide read_tail(const char* p, int64_t) const { return read(p); }
};

// part[r][t] += w[r] . x[t] over the columns begin .. end - 1, lane by lane; begin is a multiple of kGroup,
// and without tail end is one too.
template <class Read, bool kHasTail, int R, int M>
inline void dot_groups(const Read& read, const char* const* w, const uint16_t* const* x, int64_t begin,
                       int64_t end, V (&part)[R][M]) {
  for (int64_t k = begin; k < end; k += kGroup) {
    __m512bh first[M], second[M];
    for (int t = 0; t < M; ++t) {
      first[t] = (__m512bh)_mm512_load_si512(x[t] + k);
      second[t] = (__m512bh)_mm512_load_si512(x[t] + k + kGroup / 2);
    }
    for (int r = 0; r < R; ++r) {
      const char* at = w[r] + k * Read::kBytes;
      const Wide wide = !kHasTail || k + kGroup <= end ? read.read(at) : read.read_tail(at, end - k);
      for (int t = 0; t < M; ++t) part[r][t] = _mm512_dpbf16_ps(part[r][t], wide.first, first[t]);
      for (int t = 0; t < M; ++t) part[r][t] = _mm512_dpbf16_ps(part[r][t], wide.second, second[t]);
    }
  }
}

// Some rows of a weight and their block scales; rows past the last repeat it: they are computed and dropped.
template <int N>
struct RowGroup {
  const char* data[N];    // [N]
  const float* scale[N];  // [N]

  // Rows first .. first + N - 1 of a weight whose data starts with row `data_row0`; the last is end - 1.
  RowGroup(const Rows& weight, const Rows& at, int64_t data_row0, int64_t first, int64_t end) {
    const int64_t block = first / weight.block_rows;
    if (first + N <= end && first + N <= (block + 1) * weight.block_rows) {
      const char* row = at.row(first - data_row0);
      const float* row_scale = weight.scale ? weight.scale + block * weight.scale_cols : nullptr;
      for (int i = 0; i < N; ++i) {
        data[i] = row + i * at.row_bytes;
        scale[i] = row_scale;
      }
      return;
    }
    const RowPointers<N> rows(weight, at, data_row0, first, end);
    for (int i = 0; i < N; ++i) {
      data[i] = rows.data[i];
      scale[i] = rows.scale[i];
    }
  }
};

// sums[t * kStride + r] = lane sums of w[r] . x[t]: those of each block of columns, times its scale, in
// rising order. The one place where this order is written down. kBlock: the columns of a block where they are
// known, or 0.
template <class Read, bool kIsScaled, bool kHasTail, int kBlock, int kStride, int R, int M>
inline void dot_tile_bf16_of(const Read& read, const char* const* w, const float* const* scale,
                             const uint16_t* const* x, int64_t cols, int64_t given_block, V* sums) {
  V total[R][M];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < M; ++t) total[r][t] = zero();
  }
  if constexpr (kIsScaled) {
    const int64_t block_cols = kBlock > 0 ? kBlock : given_block;
    int64_t block = 0;
    for (int64_t begin = 0; begin < cols; begin += block_cols, ++block) {
      V part[R][M];
      for (int r = 0; r < R; ++r) {
        for (int t = 0; t < M; ++t) part[r][t] = zero();
      }
      const int64_t end = kBlock > 0 ? begin + kBlock : min_of(begin + block_cols, cols);
      dot_groups<Read, kHasTail, R, M>(read, w, x, begin, end, part);
      for (int r = 0; r < R; ++r) {
        const V by = set1(scale[r][block]);
        for (int t = 0; t < M; ++t) total[r][t] = fma(by, part[r][t], total[r][t]);
      }
    }
  } else {
    dot_groups<Read, kHasTail, R, M>(read, w, x, 0, cols, total);
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < M; ++t) sums[t * kStride + r] = total[r][t];
  }
}

// Weight rows that one reduction covers, and those that one tile computes, for M tokens.
constexpr int rows_of_group(int m) { return m == 3 ? 4 : kAccumulators / m; }
constexpr int rows_of_tile(int m) { return m <= 3 ? 4 : 2; }

// rows_of_group(M) sums of each of M tokens, stored from row `row` on.
template <class Read, bool kIsScaled, bool kHasTail, int kBlock, int M>
inline void linear_group_bf16(const Read& read, const LinearArgs& args, const Rows& rows,
                              const RowGroup<rows_of_group(M)>& at, int64_t row, const uint16_t* const* x,
                              int64_t token) {
  constexpr int kRows = rows_of_group(M);
  constexpr int kTileRows = rows_of_tile(M);
  V sums[kAccumulators];
  if constexpr (kRows * M < kAccumulators) {
    for (int i = kRows * M; i < kAccumulators; ++i) sums[i] = zero();
  }
#pragma GCC unroll 1
  for (int first = 0; first < kRows; first += kTileRows) {
    dot_tile_bf16_of<Read, kIsScaled, kHasTail, kBlock, kRows, kTileRows, M>(
        read, at.data + first, at.scale + first, x, rows.cols, rows.block_cols, sums + first);
  }
  alignas(64) float results[kAccumulators];  // [M, kRows]
  reduce(sums, results);
  const int64_t num_rows = min_of(kRows, args.row0 + args.rows - row);
  const int64_t num_tokens = min_of(M, args.m - token);
  const float* bias = args.weight->bias;
  for (int64_t t = 0; t < num_tokens; ++t) {
    float* out = args.out[token + t] + (row - args.out_row0);
    if (!bias && num_rows == kRows) {
      memcpy(out, results + t * kRows, kRows * sizeof(float));
      continue;
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      out[r] = bias ? results[t * kRows + r] + bias[row + r] : results[t * kRows + r];
    }
  }
}

// At most 4 tokens: each row is read, widened and used at once.
template <class Read, bool kIsScaled, bool kHasTail, int kBlock, int M>
inline void linear_few_bf16(const LinearArgs& args, const Rows& rows) {
  constexpr int kRows = rows_of_group(M);
  const Read read;
  const int64_t end = args.row0 + args.rows;
  for (int64_t row = args.row0; row < end; row += kRows) {
    const RowGroup<kRows> at(rows, rows, 0, row, end);
    linear_group_bf16<Read, kIsScaled, kHasTail, kBlock, M>(read, args, rows, at, row, args.packed, 0);
  }
}

// Many tokens: some rows are widened once, then the same sums run over them for every token. Rows of the
// panel are whole groups, zeros after the last column.
template <class Read, bool kIsScaled, bool kHasTail, int kBlock>
inline void linear_many_bf16(const LinearArgs& args, const Rows& rows) {
  constexpr int M = 4;
  constexpr int kRows = rows_of_group(M);
  const Read read;
  const PanelToBf16 read_panel;
  const int64_t end = args.row0 + args.rows;
  Rows widened = rows;
  widened.data = reinterpret_cast<const char*>(args.panel);
  widened.row_bytes = ceil_div(rows.cols, kGroup) * kGroup * PanelToBf16::kBytes;
  for (int64_t first = args.row0; first < end; first += kPanelRows) {
    const int64_t count = min_of(kPanelRows, end - first);
    for (int64_t r = 0; r < count; ++r) {
      const char* from = rows.row(first + r);
      char* to = reinterpret_cast<char*>(args.panel) + r * widened.row_bytes;
      for (int64_t k = 0; k < rows.cols; k += kGroup) {
        const char* at = from + k * Read::kBytes;
        const Wide wide =
            !kHasTail || k + kGroup <= rows.cols ? read.read(at) : read.read_tail(at, rows.cols - k);
        _mm512_store_si512(to + k * PanelToBf16::kBytes, (__m512i)wide.first);
        _mm512_store_si512(to + k * PanelToBf16::kBytes + 64, (__m512i)wide.second);
      }
    }
    for (int64_t token = 0; token < args.m; token += M) {
      const uint16_t* x[M];  // [M]
      for (int t = 0; t < M; ++t) x[t] = args.packed[min_of(token + t, args.m - 1)];
      for (int64_t r = 0; r < count; r += kRows) {
        const RowGroup<kRows> at(rows, widened, first, first + r, first + count);
        linear_group_bf16<PanelToBf16, kIsScaled, false, kBlock, M>(read_panel, args, rows, at, first + r, x,
                                                                    token);
      }
    }
  }
}

template <class Read, bool kIsScaled, bool kHasTail, int kBlock>
inline void linear_bf16_of(const LinearArgs& args) {
  const Rows rows = rows_of<Read>(*args.weight);
  switch (args.m) {
    case 1:
      return linear_few_bf16<Read, kIsScaled, kHasTail, kBlock, 1>(args, rows);
    case 2:
      return linear_few_bf16<Read, kIsScaled, kHasTail, kBlock, 2>(args, rows);
    case 3:
      return linear_few_bf16<Read, kIsScaled, kHasTail, kBlock, 3>(args, rows);
    case 4:
      return linear_few_bf16<Read, kIsScaled, kHasTail, kBlock, 4>(args, rows);
    default:
      return linear_many_bf16<Read, kIsScaled, kHasTail, kBlock>(args, rows);
  }
}

// Which weights take packed inputs: a question of the weight alone, so that every batch computes alike.
bool takes_packed(const Weight& weight) {
  if (weight.dtype == Dtype::kBF16) return true;
  return weight.dtype == Dtype::kF8E4M3 &&
         (weight.block_cols % kGroup == 0 || weight.block_cols >= weight.cols);
}

void linear_bf16(const LinearArgs& args) {
  const Weight& weight = *args.weight;
  if (!args.packed || !takes_packed(weight)) return linear(args);
  const bool has_tail = weight.cols % kGroup != 0;
  if (weight.dtype == Dtype::kBF16) {
    if (has_tail) return linear_bf16_of<Bf16ToBf16, false, true, 0>(args);
    return linear_bf16_of<Bf16ToBf16, false, false, 0>(args);
  }
  if (has_tail) return linear_bf16_of<E4m3ToBf16, true, true, 0>(args);
  if (weight.block_cols == 128 && weight.cols % 128 == 0) {
    return linear_bf16_of<E4m3ToBf16, true, false, 128>(args);
  }
  linear_bf16_of<E4m3ToBf16, true, false, 0>(args);
}

// See Kernels::pack.
void pack_bf16(const float* x, int64_t first, int64_t n, int64_t cols, uint16_t* out) {
  const int64_t end = first + n;
  const int64_t end_of_group = end == cols ? ceil_div(cols, kGroup) * kGroup : end;
  for (int64_t i = first; i < end_of_group; i += 16) {
    const int64_t left = end - i;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1);
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + (i - first)));
    uint16_t* group = out + i / kGroup * kGroup;
    const int64_t quarter = i % kGroup / 16;
    _mm_store_si128(reinterpret_cast<__m128i*>(group + quarter * 8), _mm256_castsi256_si128(bits));
    _mm_store_si128(reinterpret_cast<__m128i*>(group + 32 + quarter * 8), _mm256_extracti128_si256(bits, 1));
  }
}

void probe_bf16(int64_t n, float* out) {
  V sums[kProbeProducts];
  for (int i = 0; i < kProbeProducts; ++i) sums[i] = set1(static_cast<float>(i));
  const __m512bh by = _mm512_cvtne2ps_pbh(set1(0.5f), set1(0.25f));
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 16
    for (V& sum : sums) sum = _mm512_dpbf16_ps(sum, by, by);
  }
  for (int i = 1; i < kProbeProducts; ++i) sums[0] = add(sums[0], sums[i]);
  store(out, sums[0]);
}

}  // namespace
}  // namespace rodin
