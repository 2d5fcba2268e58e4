// Products of few tokens in the order of sums of an AMX tile, without one. For every 32 inputs tdpbf16ps sums
// the even inputs' products one after another from zero, the odd ones' too, each by a fused multiply-add,
// adds the two sums, and adds that to the output's; denormals count as zero. The same by vectors of 16
// outputs gives the same bits, and the weights stay in registers. (vdpbf16ps adds the odd product of a pair,
// then the even one, to one sum: other bits.)
#pragma once

#include "ops/cpu/kernels_bf16.h"
#include "ops/cpu/tile_ops.h"

namespace rodin {
namespace {

// The groups of 4 inputs of a weight's panels, of either kind, as bf16.
class E4m3Groups {
 public:
  static constexpr int64_t kBytes = E4m3Shift::kBytes;
  static constexpr bool kIsScaled = true;
  static constexpr float kFactor = E4m3Panel::kFactor;
  explicit E4m3Groups(const PackedRows& rows) : words_(rows.rare), words_a_panel_(rare_words(rows.inputs)) {}
  // Bit i tells whether group `first` + i of a panel is to be looked up; for 8 groups, from a multiple of 8.
  uint32_t marks(int64_t panel, int64_t first) const {
    return static_cast<uint32_t>(words_[panel * words_a_panel_ + first / 64] >> first % 64);
  }
  bool is_rare(int64_t panel, int64_t group) const {
    return words_[panel * words_a_panel_ + group / 64] >> group % 64 & 1;
  }
  Wide read(const char* p, bool is_rare) const {
    if (__builtin_expect(is_rare, 0)) return E4m3Table(kShiftedTable).read(p);
    return shift_.read(p);
  }

 private:
  const E4m3Shift shift_;
  const uint64_t* const words_;
  const int64_t words_a_panel_;
};
class Bf16Groups {
 public:
  static constexpr int64_t kBytes = Bf16Panel::kBytes;
  static constexpr bool kIsScaled = false;
  static constexpr float kFactor = 1.0f;
  explicit Bf16Groups(const PackedRows&) {}
  uint32_t marks(int64_t, int64_t) const { return 0; }
  bool is_rare(int64_t, int64_t) const { return false; }
  Wide read(const char* p, bool) const { return Bf16Panel().read(p); }
};

// Where memory is asked for, some way ahead of the P panels in hand: further on in them, or at the start of
// those that come next.
template <int P>
class AheadPanels {
 public:
  AheadPanels(const LinearArgs& args, int64_t row, const char* first_panel, int64_t panel_bytes,
              int64_t bytes)
      : panel_(first_panel), panel_bytes_(panel_bytes), bytes_(min_of(bytes, panel_bytes)) {
    const bool is_last = row + P * kPanelOutputs >= args.row0 + args.rows;
    next_ = is_last ? args.next_panels : first_panel + P * panel_bytes;
    next_panel_bytes_ = is_last ? args.next_panel_bytes : panel_bytes;
    if (next_) return;
    next_ = first_panel;  // there are none
    next_panel_bytes_ = 0;
  }
  // What byte `at` of panel p has ahead; `begin` is where the stretch that it belongs to begins.
  const char* base(int64_t p, int64_t begin) const {
    return begin + bytes_ < panel_bytes_ ? panel_ + p * panel_bytes_ + bytes_
                                         : next_ + p * next_panel_bytes_ - (panel_bytes_ - bytes_);
  }

 private:
  const char* panel_;
  const char* next_;
  int64_t panel_bytes_, next_panel_bytes_, bytes_;
};

// As many tokens as one pass over the weights takes; more meet them as tiles.
constexpr int64_t kFewTokens = 3;

inline V even_of(__m512bh pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32((__m512i)pairs, 16)); }
inline V odd_of(__m512bh pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512((__m512i)pairs, _mm512_set1_epi32(-65536)));
}

// part[p][t] += what a tile's product adds for the 32 inputs from k on; `left` of them exist, a multiple
// of 4.
template <class Groups, int P, int M>
inline void add_step(const Groups& groups, int64_t panel, const char* const* panels,
                     const AheadPanels<P>& ahead_panels, const float* const* x, int64_t k, int64_t left,
                     V (&part)[P][M]) {
  uint32_t marks[P];     // [P]
  const char* ahead[P];  // [P]
  for (int p = 0; p < P; ++p) {
    marks[p] = groups.marks(panel + p, k / kPackInputs);
    ahead[p] = ahead_panels.base(p, k / kPackInputs * Groups::kBytes);
  }
  V even[P][M], odd[P][M];
  for (int p = 0; p < P; ++p) {
    for (int t = 0; t < M; ++t) even[p][t] = odd[p][t] = zero();
  }
  for (int64_t i = 0; i < min_of(kTileInputs, left); i += kPackInputs) {
    const int64_t first = k + i;
    const int64_t at = first / kPackInputs * Groups::kBytes;
    for (int p = 0; p < P; ++p) {
      for (int64_t line = 0; line < Groups::kBytes; line += 64) {
        _mm_prefetch(ahead[p] + at + line, _MM_HINT_T0);
      }
      const Wide wide = groups.read(panels[p] + at, marks[p] & 1);
      marks[p] >>= 1;
      const V w[4] = {even_of(wide.first), odd_of(wide.first), even_of(wide.second), odd_of(wide.second)};
      for (int t = 0; t < M; ++t) {
        even[p][t] = fma(set1(x[t][first]), w[0], even[p][t]);
        odd[p][t] = fma(set1(x[t][first + 1]), w[1], odd[p][t]);
        even[p][t] = fma(set1(x[t][first + 2]), w[2], even[p][t]);
        odd[p][t] = fma(set1(x[t][first + 3]), w[3], odd[p][t]);
      }
    }
  }
  if (left < kTileInputs) {
    for (int p = 0; p < P; ++p) {
      for (int t = 0; t < M; ++t) {  // the zeros at a tile's end make 0 of -0
        even[p][t] = add(even[p][t], zero());
        odd[p][t] = add(odd[p][t], zero());
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int t = 0; t < M; ++t) part[p][t] = add(part[p][t], add(even[p][t], odd[p][t]));
  }
}

// The outputs row .. row + 16 P - 1 for M tokens. x: [M] rows of [inputs], rounded to bf16.
template <class Groups, int P, int M>
[[gnu::noinline]] void few_panels(const LinearArgs& args, const PackedRows& rows, const char* first_panel,
                                  int64_t panel_bytes, int64_t row, const float* const* x) {
  const Groups groups(rows);
  const int64_t panel = row / kPanelOutputs;
  const char* panels[P];  // [P]
  const float* scale[P];  // [P]
  for (int p = 0; p < P; ++p) {
    panels[p] = first_panel + p * panel_bytes;
    if (Groups::kIsScaled)
      scale[p] = rows.scale + (row + p * kPanelOutputs) / rows.block_rows * rows.scale_cols;
  }
  constexpr int64_t kAhead = 2048;
  const AheadPanels<P> ahead(args, row, first_panel, panel_bytes, kAhead);
  V total[P][M];
  for (int p = 0; p < P; ++p) {
    for (int t = 0; t < M; ++t) total[p][t] = zero();
  }
  if constexpr (Groups::kIsScaled) {
    int64_t block = 0;
    for (int64_t begin = 0; begin < rows.inputs; begin += rows.block_inputs, ++block) {
      V part[P][M];
      for (int p = 0; p < P; ++p) {
        for (int t = 0; t < M; ++t) part[p][t] = zero();
      }
      const int64_t end = min_of(begin + rows.block_inputs, rows.inputs);
      for (int64_t k = begin; k < end; k += kTileInputs) {
        add_step<Groups, P, M>(groups, panel, panels, ahead, x, k, end - k, part);
      }
      for (int p = 0; p < P; ++p) {
        const V by = set1(scale[p][block] * Groups::kFactor);
        for (int t = 0; t < M; ++t) total[p][t] = fma(by, part[p][t], total[p][t]);
      }
    }
  } else {
    for (int64_t k = 0; k < rows.inputs; k += kTileInputs) {
      add_step<Groups, P, M>(groups, panel, panels, ahead, x, k, rows.inputs - k, total);
    }
  }
  for (int p = 0; p < P; ++p) {
    const PanelOutputs outputs(args, row + p * kPanelOutputs);
    for (int t = 0; t < M; ++t) outputs.store(t, total[p][t]);
  }
}

template <class Groups, int P, int M>
inline int64_t few_rows(const LinearArgs& args, const PackedRows& rows, int64_t row, const float* const* x) {
  const int64_t panel_bytes = rows.inputs / kPackInputs * Groups::kBytes;
  const int64_t end = args.row0 + args.rows;
  const char* panel = static_cast<const char*>(args.weight->packed) + row / kPanelOutputs * panel_bytes;
  for (; row + (P - 1) * kPanelOutputs < end; row += P * kPanelOutputs, panel += P * panel_bytes) {
    few_panels<Groups, P, M>(args, rows, panel, panel_bytes, row, x);
  }
  return row;
}

template <class Groups, int M>
inline void linear_few_of(const LinearArgs& args, const PackedRows& rows, const float* const* x) {
  int64_t row = args.row0;
  row = few_rows<Groups, (M == 1 ? 4 : 2), M>(args, rows, row, x);
  few_rows<Groups, 1, M>(args, rows, row, x);
}

// For 1 .. kFewTokens tokens.
template <class Groups>
inline void linear_few(const LinearArgs& args) {
  const PackedRows rows(*args.weight);
  const float* x[kFewTokens];  // [kFewTokens] rows of the panel's memory
  for (int64_t t = 0; t < args.m; ++t) {
    float* to = args.panel + t * ceil_div(rows.inputs, kPanelAlign) * kPanelAlign;
    for (int64_t k = 0; k < rows.inputs; k += kLanes) {  // rows in bf16 have zeros up to a multiple of 32
      store(to + k, load_bf16(reinterpret_cast<const char*>(args.x_bf16[t] + k)));
    }
    x[t] = to;
  }
  static_assert(kFewTokens == 3);
  if (args.m == 1) return linear_few_of<Groups, 1>(args, rows, x);
  if (args.m == 2) return linear_few_of<Groups, 2>(args, rows, x);
  linear_few_of<Groups, 3>(args, rows, x);
}

}  // namespace
}  // namespace rodin
