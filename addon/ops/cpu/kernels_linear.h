// Products with a weight matrix: `linear` (dot products with its rows) and `absorb` (sums of its rows).
// Included by one translation unit per instruction path.
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/kernels_simd.h"

namespace rodin {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// A weight as the loops see it. Without block scales there is one block of all columns.
struct Rows {
  const char* data;   // row 0
  int64_t row_bytes;  // from one row to the next
  int64_t cols;
  const float* scale;  // null: none
  int64_t scale_cols;
  int64_t block_rows;
  int64_t block_cols;

  const char* row(int64_t n) const { return data + n * row_bytes; }
  const float* row_scale(int64_t n) const { return scale ? scale + n / block_rows * scale_cols : nullptr; }
};

template <class Read>
inline Rows rows_of(const Weight& weight) {
  Rows rows;
  rows.data = static_cast<const char*>(weight.data);
  rows.row_bytes = weight.cols * Read::kBytes;
  rows.cols = weight.cols;
  rows.scale = weight.scale;
  rows.block_rows = weight.scale ? weight.block_rows : 1;
  rows.block_cols = weight.scale ? weight.block_cols : weight.cols;
  rows.scale_cols = ceil_div(weight.cols, rows.block_cols);
  return rows;
}

// part[r][t] += w[r] . x[t] over the columns begin .. end - 1, lane by lane.
template <class Read, bool kHasTail, int R, int M>
inline void dot_block(const char* const* w, const float* const* x, int64_t begin, int64_t end,
                      V (&part)[R][M]) {
  int64_t k = begin;
  for (; k + kLanes <= end; k += kLanes) {
    V wide[R];
    for (int r = 0; r < R; ++r) wide[r] = Read::read(w[r] + k * Read::kBytes);
    for (int t = 0; t < M; ++t) {
      const V in = load(x[t] + k);
      for (int r = 0; r < R; ++r) part[r][t] = fma(wide[r], in, part[r][t]);
    }
  }
  if (!kHasTail || k == end) return;
  V wide[R];
  for (int r = 0; r < R; ++r) wide[r] = read_tail<Read>(w[r] + k * Read::kBytes, end - k);
  for (int t = 0; t < M; ++t) {
    const V in = load_tail(x[t] + k, end - k);
    for (int r = 0; r < R; ++r) part[r][t] = fma(wide[r], in, part[r][t]);
  }
}

// sums[r * M + t] = lane sums of w[r] . x[t]. For each block of columns in order: lanes are summed over the
// block, then added to the total times the block's scale. The one place where this order is written down.
template <class Read, bool kIsScaled, bool kHasTail, int R, int M>
inline void dot_tile_of(const char* const* w, const float* const* scale, float factor, const float* const* x,
                        int64_t cols, int64_t block_cols, V* sums) {
  V total[R][M];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < M; ++t) total[r][t] = zero();
  }
  if constexpr (kIsScaled) {
    int64_t block = 0;
    for (int64_t begin = 0; begin < cols; begin += block_cols, ++block) {
      V part[R][M];
      for (int r = 0; r < R; ++r) {
        for (int t = 0; t < M; ++t) part[r][t] = zero();
      }
      dot_block<Read, kHasTail, R, M>(w, x, begin, min_of(begin + block_cols, cols), part);
      for (int r = 0; r < R; ++r) {
        const V by = set1(scale[r][block] * factor);
        for (int t = 0; t < M; ++t) total[r][t] = fma(by, part[r][t], total[r][t]);
      }
    }
  } else {
    dot_block<Read, kHasTail, R, M>(w, x, 0, cols, total);
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < M; ++t) sums[r * M + t] = total[r][t];
  }
}

template <class Read, bool kIsScaled, int R, int M>
inline void dot_tile(const char* const* w, const float* const* scale, float factor, const float* const* x,
                     int64_t cols, int64_t block_cols, V* sums) {
  if (cols % kLanes == 0 && block_cols % kLanes == 0) {
    dot_tile_of<Read, kIsScaled, false, R, M>(w, scale, factor, x, cols, block_cols, sums);
  } else {
    dot_tile_of<Read, kIsScaled, true, R, M>(w, scale, factor, x, cols, block_cols, sums);
  }
}

// Where some rows and their block scales lie. Rows past the last repeat it: they are computed and dropped.
template <int N>
struct RowPointers {
  const char* data[N];    // [N]
  const float* scale[N];  // [N]

  // Rows first .. first + N - 1 of a weight whose data starts with row `data_row0`; the last is end - 1.
  RowPointers(const Rows& weight, const Rows& at, int64_t data_row0, int64_t first, int64_t end) {
    int64_t block = first / weight.block_rows;
    int64_t next_block = (block + 1) * weight.block_rows;
    for (int i = 0; i < N; ++i) {
      if (first + i >= end) {
        data[i] = data[i - 1];
        scale[i] = scale[i - 1];
        continue;
      }
      if (first + i == next_block) {
        ++block;
        next_block += weight.block_rows;
      }
      data[i] = at.row(first + i - data_row0);
      scale[i] = weight.scale ? weight.scale + block * weight.scale_cols : nullptr;
    }
  }
};

// kAccumulators sums from R = kAccumulators / M weight rows and M tokens, stored from row `row` on.
template <class Read, bool kIsScaled, int M>
inline void linear_group(const LinearArgs& args, const Rows& rows, const char* const* w,
                         const float* const* scale, float factor, int64_t row, const float* const* x,
                         int64_t token) {
  constexpr int kRows = kAccumulators / M;
  constexpr int kTileRows = M == 1 ? 8 : 4;
  V sums[kAccumulators];
  for (int first = 0; first < kRows; first += kTileRows) {
    dot_tile<Read, kIsScaled, kTileRows, M>(w + first, scale + first, factor, x, rows.cols, rows.block_cols,
                                            sums + first * M);
  }
  float results[kAccumulators];  // [kRows, M]
  reduce(sums, results);
  const int64_t num_rows = min_of(kRows, args.row0 + args.rows - row);
  const int64_t num_tokens = min_of(M, args.m - token);
  const float* bias = args.weight->bias;
  for (int64_t t = 0; t < num_tokens; ++t) {
    float* out = args.out[token + t] + (row - args.out_row0);
    for (int64_t r = 0; r < num_rows; ++r) {
      out[r] = bias ? results[r * M + t] + bias[row + r] : results[r * M + t];
    }
  }
}

template <class Read>
inline void widen_rows(const Rows& rows, int64_t row0, int64_t count, int64_t stride, float* out) {
  for (int64_t r = 0; r < count; ++r) {
    const char* from = rows.row(row0 + r);
    float* to = out + r * stride;
    int64_t k = 0;
    for (; k + kLanes <= rows.cols; k += kLanes) store(to + k, Read::read(from + k * Read::kBytes));
    if (k < rows.cols)
      store_tail(to + k, read_tail<Read>(from + k * Read::kBytes, rows.cols - k), rows.cols - k);
  }
}

// At most kTileTokens tokens: each row is read, widened and used at once.
template <class Read, bool kIsScaled, int M>
inline void linear_few(const LinearArgs& args, const Rows& rows) {
  constexpr int kRows = kAccumulators / M;
  const int64_t end = args.row0 + args.rows;
  const float* x[M];  // [M]
  for (int t = 0; t < M; ++t) x[t] = args.x[min_of(t, args.m - 1)];
  for (int64_t row = args.row0; row < end; row += kRows) {
    const RowPointers<kRows> at(rows, rows, 0, row, end);
    linear_group<Read, kIsScaled, M>(args, rows, at.data, at.scale, Read::kFactor, row, x, 0);
  }
}

// Many tokens: some rows are widened once, then the same sums run over them for every token.
template <class Read, bool kIsScaled>
inline void linear_many(const LinearArgs& args, const Rows& rows) {
  constexpr int M = kTileTokens;
  constexpr int kRows = kAccumulators / M;
  const int64_t end = args.row0 + args.rows;
  const int64_t stride = ceil_div(rows.cols, kPanelAlign) * kPanelAlign;
  Rows panel = rows;
  panel.data = reinterpret_cast<const char*>(args.panel);
  panel.row_bytes = stride * static_cast<int64_t>(sizeof(float));
  for (int64_t first = args.row0; first < end; first += kPanelRows) {
    const int64_t count = min_of(kPanelRows, end - first);
    const RowPointers<kPanelRows> at(rows, panel, first, first, first + count);
    widen_rows<Read>(rows, first, count, stride, args.panel);
    for (int64_t token = 0; token < args.m; token += M) {
      const float* x[M];  // [M]
      for (int t = 0; t < M; ++t) x[t] = args.x[min_of(token + t, args.m - 1)];
      for (int64_t r = 0; r < count; r += kRows) {
        linear_group<ReadF32, kIsScaled, M>(args, rows, at.data + r, at.scale + r, Read::kFactor, first + r,
                                            x, token);
      }
    }
  }
}

template <class Read, bool kIsScaled>
inline void linear_of(const LinearArgs& args) {
  const Rows rows = rows_of<Read>(*args.weight);
  if (args.m == 1) return linear_few<Read, kIsScaled, 1>(args, rows);
  if (args.m == 2) return linear_few<Read, kIsScaled, 2>(args, rows);
  if (args.m <= kTileTokens) return linear_few<Read, kIsScaled, kTileTokens>(args, rows);
  linear_many<Read, kIsScaled>(args, rows);
}

void linear(const LinearArgs& args) {
  switch (args.weight->dtype) {
    case Dtype::kF8E4M3:
      return linear_of<ReadE4m3, true>(args);
    case Dtype::kBF16:
      return linear_of<ReadBf16, false>(args);
    case Dtype::kF16:
      return linear_of<ReadF16, false>(args);
    default:
      return linear_of<ReadF32, false>(args);
  }
}

// out[r][c] = sum over j in first .. end - 1 of a[r][j] * row_j[c], j ascending, for `vectors` vectors of
// columns from `col` on; of the last vector only `tail` columns exist.
template <class Read, int R, int C, class RowOf>
inline void mix_tile(const float* const* a, const RowOf& row_of, int64_t first, int64_t end, int64_t col,
                     V (*sums)[C]) {
  V acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  }
  for (int64_t j = first; j < end; ++j) {
    const char* row = row_of(j) + col * Read::kBytes;
    V wide[C];
    for (int c = 0; c < C; ++c) wide[c] = Read::read(row + c * kLanes * Read::kBytes);
    for (int r = 0; r < R; ++r) {
      const V by = set1(a[r][j]);
      for (int c = 0; c < C; ++c) acc[r][c] = fma(by, wide[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = acc[r][c];
  }
}

// The columns col0 .. col1 - 1 of mix_tile for R rows, stored times `factor`.
template <class Read, int R, class RowOf>
inline void mix_columns(const float* const* a, const RowOf& row_of, int64_t first, int64_t end, int64_t col0,
                        int64_t col1, float factor, float* const* out) {
  constexpr int kCols = kAccumulators / R < 8 ? kAccumulators / R : 8;
  const V by = set1(factor);
  int64_t col = col0;
  for (; col + kCols * kLanes <= col1; col += kCols * kLanes) {
    V sums[R][kCols];
    mix_tile<Read, R, kCols>(a, row_of, first, end, col, sums);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < kCols; ++c) store(out[r] + col + c * kLanes, mul(by, sums[r][c]));
    }
  }
  for (; col + kLanes <= col1; col += kLanes) {
    V sums[R][1];
    mix_tile<Read, R, 1>(a, row_of, first, end, col, sums);
    for (int r = 0; r < R; ++r) store(out[r] + col, mul(by, sums[r][0]));
  }
  if (col == col1) return;
  V sums[R];
  for (int r = 0; r < R; ++r) sums[r] = zero();
  for (int64_t j = first; j < end; ++j) {
    const V wide = read_tail<Read>(row_of(j) + col * Read::kBytes, col1 - col);
    for (int r = 0; r < R; ++r) sums[r] = fma(set1(a[r][j]), wide, sums[r]);
  }
  for (int r = 0; r < R; ++r) store_tail(out[r] + col, mul(by, sums[r]), col1 - col);
}

// R tokens of absorb over rows of `data` (the weight, or its widened copy).
template <class Read, int R>
inline void absorb_tokens(const AbsorbArgs& args, const Rows& rows, const Rows& data, int64_t data_row0,
                          float read_factor, int64_t token) {
  const float* a[R];  // [R]
  float* out[R];      // [R]
  for (int r = 0; r < R; ++r) {
    const int64_t t = min_of(token + r, args.m - 1);
    a[r] = args.a[t];
    out[r] = args.out[t];
  }
  const auto row_of = [&](int64_t d) { return data.row(args.row0 + d - data_row0); };
  if (!rows.scale) {
    mix_columns<Read, R>(a, row_of, 0, args.rows, 0, rows.cols, args.factor, out);
    return;
  }
  // One block of columns at a time: its scales go into the multipliers.
  const float* scaled[R];  // [R] rows of [args.rows]
  for (int r = 0; r < R; ++r) scaled[r] = args.scaled + r * args.rows;
  int64_t block = 0;
  for (int64_t col = 0; col < rows.cols; col += rows.block_cols, ++block) {
    const float* row_scale = rows.row_scale(args.row0) + block;
    int64_t next_block = (args.row0 / rows.block_rows + 1) * rows.block_rows - args.row0;
    for (int64_t d = 0; d < args.rows; ++d) {
      if (d == next_block) {
        row_scale += rows.scale_cols;
        next_block += rows.block_rows;
      }
      const float scale = *row_scale * read_factor;
      for (int r = 0; r < R; ++r) args.scaled[r * args.rows + d] = a[r][d] * scale;
    }
    mix_columns<Read, R>(scaled, row_of, 0, args.rows, col, min_of(col + rows.block_cols, rows.cols),
                         args.factor, out);
  }
}

template <class Read>
inline void absorb_of(const AbsorbArgs& args) {
  const Rows rows = rows_of<Read>(*args.weight);
  if (args.m == 1) return absorb_tokens<Read, 1>(args, rows, rows, 0, Read::kFactor, 0);
  if (args.m <= 4) return absorb_tokens<Read, 4>(args, rows, rows, 0, Read::kFactor, 0);
  widen_rows<Read>(rows, args.row0, args.rows, rows.cols, args.panel);
  Rows panel = rows;
  panel.data = reinterpret_cast<const char*>(args.panel);
  panel.row_bytes = rows.cols * static_cast<int64_t>(sizeof(float));
  for (int64_t token = 0; token < args.m; token += 4) {
    absorb_tokens<ReadF32, 4>(args, rows, panel, args.row0, Read::kFactor, token);
  }
}

void absorb(const AbsorbArgs& args) {
  switch (args.weight->dtype) {
    case Dtype::kF8E4M3:
      return absorb_of<ReadE4m3>(args);
    case Dtype::kBF16:
      return absorb_of<ReadBf16>(args);
    case Dtype::kF16:
      return absorb_of<ReadF16>(args);
    default:
      return absorb_of<ReadF32>(args);
  }
}

}  // namespace
}  // namespace rodin
