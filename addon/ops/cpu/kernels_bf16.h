// Products with packed FP8 and BF16 weights by vdpbf16ps. Inputs come rounded to bf16. e4m3 is widened to
// bf16 exactly, denormals included: bf16 has the wider exponent, so that the instruction's flushing of
// denormals touches no weight. Normal codes are shifted to their place and get another exponent bias; 64
// codes with a denormal or a zero among them, about one such lot in a hundred, are looked up in a table.
// Included by the units that have AVX512-BF16 and VBMI.
#pragma once

#include "ops/cpu/kernels_linear.h"
#include "ops/cpu/packed_weight.h"

namespace rodin {
namespace {

// The two bytes of the bf16 that e4m3's magnitude bits stand for, times 2^(bias - 120).
struct WideTable {
  alignas(64) uint8_t low[128];   // [128]
  alignas(64) uint8_t high[128];  // [128]
};
constexpr WideTable make_wide_table(int bias) {
  WideTable table = {};
  for (int code = 0; code < 128; ++code) {
    int exponent = code >> 3;
    int mantissa = code & 7;
    if (exponent == 0 && mantissa != 0) {
      for (exponent = 1; mantissa < 8; --exponent) mantissa *= 2;
      mantissa -= 8;
    }
    int bits = code == 0 ? 0 : ((exponent + bias) << 7) | (mantissa << 4);
    if (code == 0x7f) bits = 0x7fc0;
    table.low[code] = static_cast<uint8_t>(bits & 0xff);
    table.high[code] = static_cast<uint8_t>(bits >> 8);
  }
  return table;
}
constexpr WideTable kWideTable = make_wide_table(120);
// The bias of a shifted code, so that the exponent's bits do not carry.
constexpr int kShiftedBias = 112;
constexpr WideTable kShiftedTable = make_wide_table(kShiftedBias);

// 4 inputs of 16 outputs as bf16: pairs (k, k+1), pairs (k+2, k+3).
struct Wide {
  __m512bh first;
  __m512bh second;
};

// How many bytes 4 inputs of a panel take, and how they are read.
class E4m3Table {
 public:
  static constexpr int64_t kBytes = 64;
  explicit E4m3Table(const WideTable& table = kWideTable)
      : low0_(_mm512_load_si512(table.low)),
        low1_(_mm512_load_si512(table.low + 64)),
        high0_(_mm512_load_si512(table.high)),
        high1_(_mm512_load_si512(table.high + 64)),
        sign_(_mm512_set1_epi8(static_cast<char>(0x80))) {}
  Wide read(const char* p) const {
    __m512i codes = _mm512_load_si512(p);
    asm("" : "+v"(codes));  // loaded once: the compiler would rather load it for each use, which is slower
    const __m512i low = _mm512_permutex2var_epi8(low0_, codes, low1_);
    const __m512i high =
        _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(high0_, codes, high1_), codes, sign_, 0xf8);
    const __m512i is_high = _mm512_set1_epi16(static_cast<int16_t>(0xff00));  // ? second operand : third
    return {(__m512bh)_mm512_ternarylogic_epi64(is_high, high, _mm512_srli_epi16(low, 8), 0xca),
            (__m512bh)_mm512_ternarylogic_epi64(is_high, _mm512_slli_epi16(high, 8), low, 0xca)};
  }

 private:
  const __m512i low0_, low1_, high0_, high1_, sign_;
};
// Normal codes alone, times 2^-8.
class E4m3Shift {
 public:
  static constexpr int64_t kBytes = 64;
  Wide read(const char* p) const {
    __m512i codes = _mm512_load_si512(p);
    asm("" : "+v"(codes));
    return {widen(_mm512_srai_epi16(codes, 4)), widen(_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 4))};
  }

 private:
  __m512bh widen(__m512i shifted) const {
    return (__m512bh)_mm512_ternarylogic_epi64(shifted, mask_, bias_, 0xea);
  }
  const __m512i mask_ = _mm512_set1_epi16(static_cast<int16_t>(0x87f0));
  const __m512i bias_ = _mm512_set1_epi16(kShiftedBias << 7);
};
// Both: which groups are looked up the bits behind the panels tell.
struct E4m3Panel : E4m3Table {
  static constexpr bool kHasRare = true;
  static constexpr float kFactor = 256.0f;  // what products with shifted codes are still to be multiplied by
};
class Bf16Panel {
 public:
  static constexpr bool kHasRare = false;
  static constexpr float kFactor = 1.0f;
  static constexpr int64_t kBytes = 128;
  Wide read(const char* p) const {
    return {(__m512bh)_mm512_load_si512(p), (__m512bh)_mm512_load_si512(p + 64)};
  }
};

inline __m512bh pair_of(const uint16_t* x) {
  int32_t pair;
  memcpy(&pair, x, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// part[p][t] += panel p . x[t] over the groups of 4 inputs begin .. end - 1, in rising order. What lies
// `ahead` bytes after the panels is asked for on the way.
template <class Read, int P, int M>
inline void dot_panels(const Read& read, const char* const* panels, int64_t ahead, const uint16_t* const* x,
                       int64_t begin, int64_t end, V (&part)[P][M]) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t at = group * Read::kBytes;
    const int64_t k = group * kPackInputs;
    for (int p = 0; p < P; ++p) _mm_prefetch(panels[p] + at + ahead, _MM_HINT_T1);
    if constexpr (M == 1) {  // one panel after another: the inputs stay in registers
      const __m512bh first = pair_of(x[0] + k), second = pair_of(x[0] + k + 2);
      for (int p = 0; p < P; ++p) {
        const Wide wide = read.read(panels[p] + at);
        part[p][0] = _mm512_dpbf16_ps(part[p][0], wide.first, first);
        part[p][0] = _mm512_dpbf16_ps(part[p][0], wide.second, second);
      }
      continue;
    }
    Wide wide[P];
    for (int p = 0; p < P; ++p) wide[p] = read.read(panels[p] + at);
    for (int t = 0; t < M; ++t) {
      const __m512bh pair = pair_of(x[t] + k);
      for (int p = 0; p < P; ++p) part[p][t] = _mm512_dpbf16_ps(part[p][t], wide[p].first, pair);
    }
    for (int t = 0; t < M; ++t) {
      const __m512bh pair = pair_of(x[t] + k + 2);
      for (int p = 0; p < P; ++p) part[p][t] = _mm512_dpbf16_ps(part[p][t], wide[p].second, pair);
    }
  }
}

// The same for panels of FP8, whose groups that are `rare` are looked up: bit g % 64 of word g / 64 of each.
template <int P, int M>
inline void dot_marked_panels(const char* const* panels, const uint64_t* const* rare, int64_t ahead,
                              const uint16_t* const* x, int64_t begin, int64_t end, V (&part)[P][M]) {
  const E4m3Shift shift;
  for (int64_t group = begin; group < end;) {
    uint64_t marks = 0;  // from `group` on
    for (int p = 0; p < P; ++p) marks |= rare[p][group >> 6];
    marks >>= group & 63;
    const int64_t stop = min_of((group | 63) + 1, end);
    const int64_t next = marks == 0 ? stop : min_of(stop, group + __builtin_ctzll(marks));
    dot_panels<E4m3Shift, P, M>(shift, panels, ahead, x, group, next, part);
    group = next;
    if (next == stop) continue;
    dot_panels<E4m3Table, P, M>(E4m3Table(kShiftedTable), panels, ahead, x, next, next + 1, part);
    group = next + 1;
  }
}

// Bytes of FP8 panels.
inline int64_t panel_bytes_of(int64_t rows, int64_t inputs) {
  return ceil_div(rows, kPanelOutputs) * kPanelOutputs * inputs;
}

// Where the block scales of a weight lie, for the loops.
struct PackedRows {
  const float* scale;  // null: none
  int64_t scale_cols;
  int64_t block_rows;
  int64_t block_inputs;  // of one scale, rounded up to whole groups
  int64_t inputs;        // columns rounded up to whole groups
  const uint64_t* rare;  // [panels, rare_words(cols)] of FP8

  explicit PackedRows(const Weight& weight)
      : scale(weight.scale),
        scale_cols(weight.scale_cols()),
        block_rows(weight.scale ? weight.block_rows : 1),
        inputs(ceil_div(weight.cols, kPackInputs) * kPackInputs) {
    rare = reinterpret_cast<const uint64_t*>(static_cast<const char*>(weight.packed) +
                                             panel_bytes_of(weight.rows, inputs));
    block_inputs = weight.scale && weight.block_cols < inputs ? weight.block_cols : inputs;
  }
};

// How far ahead of the panels in hand memory is asked for: the next panels, or where those are long a
// distance that a core takes some hundred nanoseconds for.
inline int64_t bytes_ahead(int64_t all_panels_bytes) {
  constexpr int64_t kFar = 64 * 1024, kNear = 1024;
  return all_panels_bytes <= kFar ? all_panels_bytes : kNear;
}

// Where the outputs of the panel that begins with row `at` go: those of a call's rows, with their biases.
class PanelOutputs {
 public:
  PanelOutputs(const LinearArgs& args, int64_t at) : out_(args.out), column_(at - args.out_row0) {
    const int64_t left = args.row0 + args.rows - at;
    mask_ = static_cast<__mmask16>(left >= kPanelOutputs ? 0xffff : (1u << left) - 1);
    has_bias_ = args.weight->bias != nullptr;
    bias_ = has_bias_ ? _mm512_maskz_loadu_ps(mask_, args.weight->bias + at) : zero();
  }
  void store(int64_t token, V sum) const {
    _mm512_mask_storeu_ps(out_[token] + column_, mask_, has_bias_ ? add(sum, bias_) : sum);
  }

 private:
  float* const* const out_;
  const int64_t column_;
  __mmask16 mask_;
  bool has_bias_;
  V bias_;
};

// The outputs row .. row + 16 P - 1 for M tokens from `token` on. Of each output, the sum over a block of
// inputs, times its scale, is added to those of the blocks before: the one place where this order is written
// down.
// A function of its own, so that its tables and sums have all registers.
template <class Read, bool kIsScaled, int P, int M>
[[gnu::noinline]] void linear_panels(const LinearArgs& args, const PackedRows& rows, const char* first_panel,
                                     int64_t panel_bytes, int64_t row, int64_t token) {
  const char* panels[P];    // [P]
  const float* scale[P];    // [P]
  const uint64_t* rare[P];  // [P]
  for (int p = 0; p < P; ++p) {
    panels[p] = first_panel + p * panel_bytes;
    if (Read::kHasRare) rare[p] = rows.rare + (row / kPanelOutputs + p) * rare_words(rows.inputs);
    if (kIsScaled) scale[p] = rows.scale + (row + p * kPanelOutputs) / rows.block_rows * rows.scale_cols;
  }
  const uint16_t* x[M];  // [M]
  for (int t = 0; t < M; ++t) x[t] = args.x_bf16[min_of(token + t, args.m - 1)];
  const int64_t ahead = bytes_ahead(P * panel_bytes);
  V total[P][M];
  for (int p = 0; p < P; ++p) {
    for (int t = 0; t < M; ++t) total[p][t] = zero();
  }
  if constexpr (kIsScaled) {
    int64_t block = 0;
    for (int64_t begin = 0; begin < rows.inputs; begin += rows.block_inputs, ++block) {
      V part[P][M];
      for (int p = 0; p < P; ++p) {
        for (int t = 0; t < M; ++t) part[p][t] = zero();
      }
      const int64_t end = min_of(begin + rows.block_inputs, rows.inputs);
      if constexpr (Read::kHasRare) {
        dot_marked_panels<P, M>(panels, rare, ahead, x, begin / kPackInputs, end / kPackInputs, part);
      } else {
        dot_panels<Read, P, M>(Read(), panels, ahead, x, begin / kPackInputs, end / kPackInputs, part);
      }
      for (int p = 0; p < P; ++p) {
        const V by = set1(scale[p][block] * Read::kFactor);
        for (int t = 0; t < M; ++t) total[p][t] = fma(by, part[p][t], total[p][t]);
      }
    }
  } else {
    dot_panels<Read, P, M>(Read(), panels, ahead, x, 0, rows.inputs / kPackInputs, total);
  }
  const int64_t num_tokens = min_of(M, args.m - token);
  for (int p = 0; p < P; ++p) {
    const PanelOutputs outputs(args, row + p * kPanelOutputs);
    for (int64_t t = 0; t < num_tokens; ++t) outputs.store(token + t, total[p][t]);
  }
}

// Tokens that one pass over the weights serves at most. Few tokens take several panels at once: as many sums
// as registers hold beside the tables, and enough independent ones to hide an instruction's latency.
constexpr int kMaxTokens = 12;

// P panels from `row` on for the tokens token .. token + num_tokens - 1, which are kMin .. kMax.
template <class Read, bool kIsScaled, int P, int kMin, int kMax>
inline void linear_tokens(const LinearArgs& args, const PackedRows& rows, const char* panel,
                          int64_t panel_bytes, int64_t row, int64_t token, int64_t num_tokens) {
  if constexpr (kMin < kMax) {
    if (num_tokens > kMin) {
      return linear_tokens<Read, kIsScaled, P, kMin + 1, kMax>(args, rows, panel, panel_bytes, row, token,
                                                               num_tokens);
    }
  }
  linear_panels<Read, kIsScaled, P, kMin>(args, rows, panel, panel_bytes, row, token);
}

// The rows from `row` on, P panels at a time as long as there are so many; all tokens over some panels, while
// those are in the cache. A pass serves at most kMax tokens. Returns the row after the last.
template <class Read, bool kIsScaled, int P, int kMax>
inline int64_t linear_rows(const LinearArgs& args, const PackedRows& rows, int64_t row, int64_t per_pass) {
  const int64_t panel_bytes = rows.inputs / kPackInputs * Read::kBytes;
  const int64_t end = args.row0 + args.rows;
  const char* panel = static_cast<const char*>(args.weight->packed) + row / kPanelOutputs * panel_bytes;
  for (; row + (P - 1) * kPanelOutputs < end; row += P * kPanelOutputs, panel += P * panel_bytes) {
    for (int64_t token = 0; token < args.m; token += per_pass) {
      linear_tokens<Read, kIsScaled, P, 1, kMax>(args, rows, panel, panel_bytes, row, token,
                                                 min_of(per_pass, args.m - token));
    }
  }
  return row;
}

template <class Read, bool kIsScaled>
inline void linear_packed_of(const LinearArgs& args) {
  if (args.m == 0) return;
  const PackedRows rows(*args.weight);
  const int64_t per_pass = ceil_div(args.m, ceil_div(args.m, kMaxTokens));
  int64_t row = args.row0;
  if (per_pass <= 3) row = linear_rows<Read, kIsScaled, 4, 3>(args, rows, row, per_pass);
  if (per_pass <= 5) row = linear_rows<Read, kIsScaled, 2, 5>(args, rows, row, per_pass);
  linear_rows<Read, kIsScaled, 1, kMaxTokens>(args, rows, row, per_pass);
}

[[maybe_unused]] void linear_bf16(const LinearArgs& args) {
  if (!args.x_bf16 || !args.weight->packed) return linear(args);
  if (args.weight->dtype == Dtype::kF8E4M3) return linear_packed_of<E4m3Panel, true>(args);
  linear_packed_of<Bf16Panel, false>(args);
}

void to_bf16(const float* x, int64_t n, uint16_t* out) {
  const int64_t padded = ceil_div(n, 32) * 32;
  for (int64_t i = 0; i < padded; i += 16) {
    const int64_t left = n - i;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1);
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bits);
  }
}

[[maybe_unused]] void probe_bf16(int64_t n, float* out) {
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
