// Products with packed weights on the AMX path: few tokens by vectors (kernels_amx_few.h), more by tiles,
// with FP8 weights as a rule in kernels_amx_wide.h. Here are the others: BF16 weights, whose packed form is
// that of a tile already, and FP8 ones whose blocks of scales are too long for a pass; 32 inputs at a time of
// up to 32 tokens and 32 outputs. All have one order of sums. Included by units that have AMX-BF16.
#pragma once

#include "ops/cpu/kernels_amx_few.h"
#include "ops/cpu/kernels_amx_wide.h"

namespace rodin {
namespace {

constexpr int64_t kTileTokenRows = 2 * kTileRows;  // tokens of one pass
constexpr int64_t kTileOutputs = 2 * kPanelOutputs;

// Tiles: 0, 1 sums of the first tokens; 2, 3 of the later ones; 4, 5 inputs of either; 6, 7 weights of two
// panels.
inline void configure_tiles(int64_t num_tokens) {
  TileConfig config;
  const int64_t later = num_tokens > kTileRows ? num_tokens - kTileRows : 0;
  const int64_t rows[8] = {num_tokens - later, num_tokens - later, later, later, num_tokens - later, later,
                           kTileRows,          kTileRows};
  for (int tile = 0; tile < 8; ++tile) {
    // A tile without rows is not a tile: it keeps one, which nobody uses.
    config.rows[tile] = static_cast<uint8_t>(rows[tile] > 0 ? rows[tile] : 1);
    config.row_bytes[tile] = 64;
  }
  TILE_CONFIG(&config);
}

// Adds the products of `steps` times 32 inputs to the sums. weights: [panels] of whole tiles; x: the first
// input of the first token, rows `stride` elements apart.
template <bool kHasLater, bool kHasSecond>
inline void multiply_tiles(const char* const* weights, const uint16_t* x, int64_t stride, int64_t steps) {
  const auto row_bytes = static_cast<size_t>(stride) * sizeof(uint16_t);
  for (int64_t step = 0; step < steps; ++step) {
    const uint16_t* inputs = x + step * kTileInputs;
    TILE_LOAD(4, inputs, row_bytes);
    TILE_LOAD(6, weights[0] + step * kTileBytes, 64);
    TILE_MULTIPLY(0, 4, 6);
    if constexpr (kHasSecond) {
      TILE_LOAD(7, weights[1] + step * kTileBytes, 64);
      TILE_MULTIPLY(1, 4, 7);
    }
    if constexpr (kHasLater) {
      TILE_LOAD(5, inputs + kTileRows * stride, row_bytes);
      TILE_MULTIPLY(2, 5, 6);
      if constexpr (kHasSecond) TILE_MULTIPLY(3, 5, 7);
    }
  }
}

// Sums of a pass as floats: [tokens, kTileOutputs].
using TileSums = float[kTileTokenRows][kTileOutputs];

template <bool kHasLater, bool kHasSecond>
inline void take_sums(TileSums& sums) {
  constexpr size_t kStride = kTileOutputs * sizeof(float);
  TILE_STORE(0, &sums[0][0], kStride);
  TILE_ZERO(0);
  if constexpr (kHasSecond) {
    TILE_STORE(1, &sums[0][kPanelOutputs], kStride);
    TILE_ZERO(1);
  }
  if constexpr (kHasLater) {
    TILE_STORE(2, &sums[kTileRows][0], kStride);
    TILE_ZERO(2);
    if constexpr (kHasSecond) {
      TILE_STORE(3, &sums[kTileRows][kPanelOutputs], kStride);
      TILE_ZERO(3);
    }
  }
}

// The outputs row .. row + 31 (15 without a second panel) for the tokens token .. token + num_tokens - 1. Of
// each output, the sum over a block of inputs, times its scale, is added to those of the blocks before.
template <bool kIsScaled, bool kHasLater, bool kHasSecond>
inline void linear_tiles(const LinearArgs& args, const PackedRows& rows, const char* const* weights,
                         int64_t row, int64_t token, int64_t num_tokens) {
  const uint16_t* x = args.x_bf16[token];
  const int64_t stride = args.m > 1 ? args.x_bf16[1] - args.x_bf16[0] : 0;
  alignas(64) TileSums part;
  alignas(64) TileSums total;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  const int64_t steps = ceil_div(rows.inputs, kTileInputs);
  if constexpr (kIsScaled) {
    const int64_t block_steps = ceil_div(rows.block_inputs, kTileInputs);
    const float* scale[2];  // [2]
    for (int p = 0; p < 2; ++p) {
      const int64_t at = kHasSecond ? row + p * kPanelOutputs : row;
      scale[p] = rows.scale + at / rows.block_rows * rows.scale_cols;
    }
    for (int64_t t = 0; t < num_tokens; ++t) {
      store(total[t], zero());
      store(total[t] + kPanelOutputs, zero());
    }
    for (int64_t first = 0, block = 0; first < steps; first += block_steps, ++block) {
      const char* at[2] = {weights[0] + first * kTileBytes, weights[1] + first * kTileBytes};
      multiply_tiles<kHasLater, kHasSecond>(at, x + first * kTileInputs, stride,
                                            min_of(block_steps, steps - first));
      take_sums<kHasLater, kHasSecond>(part);
      for (int p = 0; p < (kHasSecond ? 2 : 1); ++p) {
        const V by = set1(scale[p][block] * E4m3Groups::kFactor);
        for (int64_t t = 0; t < num_tokens; ++t) {
          float* sum = total[t] + p * kPanelOutputs;
          store(sum, fma(by, load(part[t] + p * kPanelOutputs), load(sum)));
        }
      }
    }
  } else {
    multiply_tiles<kHasLater, kHasSecond>(weights, x, stride, steps);
    take_sums<kHasLater, kHasSecond>(total);
  }
  for (int p = 0; p < (kHasSecond ? 2 : 1); ++p) {
    const PanelOutputs outputs(args, row + p * kPanelOutputs);
    for (int64_t t = 0; t < num_tokens; ++t) outputs.store(token + t, load(total[t] + p * kPanelOutputs));
  }
}

// Panel `index`, at `panel`, as whole tiles in working memory, zeros after the last input.
template <class Groups>
inline void widen_tiles(const Groups& reader, int64_t index, const char* panel, int64_t inputs, char* tiles) {
  const int64_t groups = inputs / kPackInputs;
  for (int64_t group = 0; group < groups; ++group) {
    const Wide wide = reader.read(panel + group * Groups::kBytes, reader.is_rare(index, group));
    _mm512_store_si512(tiles + group * 128, (__m512i)wide.first);
    _mm512_store_si512(tiles + group * 128 + 64, (__m512i)wide.second);
  }
  const int64_t all = ceil_div(inputs, kTileInputs) * (kTileInputs / kPackInputs);
  for (int64_t group = groups; group < all; ++group) {
    _mm512_store_si512(tiles + group * 128, _mm512_setzero_si512());
    _mm512_store_si512(tiles + group * 128 + 64, _mm512_setzero_si512());
  }
}

template <bool kIsScaled, bool kHasSecond>
inline void linear_panel_tiles(const LinearArgs& args, const PackedRows& rows, const char* const* weights,
                               int64_t row) {
  for (int64_t token = 0; token < args.m; token += kTileTokenRows) {
    const int64_t num_tokens = min_of(kTileTokenRows, args.m - token);
    if (token == 0 || num_tokens < kTileTokenRows) configure_tiles(num_tokens);
    if (num_tokens > kTileRows) {
      linear_tiles<kIsScaled, true, kHasSecond>(args, rows, weights, row, token, num_tokens);
    } else {
      linear_tiles<kIsScaled, false, kHasSecond>(args, rows, weights, row, token, num_tokens);
    }
  }
}

template <class Groups>
[[gnu::noinline]] void linear_amx_of(const LinearArgs& args) {
  const PackedRows rows(*args.weight);
  const Groups reader(rows);
  const int64_t panel_bytes = rows.inputs / kPackInputs * Groups::kBytes;
  const int64_t tile_bytes = ceil_div(rows.inputs, kTileInputs) * kTileBytes;
  const bool is_in_place = !Groups::kIsScaled && rows.inputs % kTileInputs == 0;
  auto* tiles = reinterpret_cast<char*>(args.panel);  // [2, inputs / 32 rounded up, kTileBytes]
  const char* panel = static_cast<const char*>(args.weight->packed) + args.row0 / kPanelOutputs * panel_bytes;
  const int64_t end = args.row0 + args.rows;
  for (int64_t row = args.row0; row < end; row += kTileOutputs, panel += 2 * panel_bytes) {
    const bool has_second = row + kPanelOutputs < end;
    const char* weights[2] = {panel, panel + panel_bytes};  // [2]
    if (!is_in_place) {
      for (int p = 0; p < (has_second ? 2 : 1); ++p) {
        widen_tiles(reader, row / kPanelOutputs + p, weights[p], rows.inputs, tiles + p * tile_bytes);
        weights[p] = tiles + p * tile_bytes;
      }
      TILE_FENCE();
    }
    if (has_second) {
      linear_panel_tiles<Groups::kIsScaled, true>(args, rows, weights, row);
    } else {
      weights[1] = weights[0];
      linear_panel_tiles<Groups::kIsScaled, false>(args, rows, weights, row);
    }
  }
  TILE_RELEASE();
}

void linear_amx(const LinearArgs& args) {
  if (!args.x_bf16 || !args.weight->packed) return linear(args);
  const bool is_scaled = args.weight->dtype == Dtype::kF8E4M3;
  // A block of inputs that is no whole number of tiles would share one with the next.
  const bool has_whole_blocks =
      args.weight->block_cols % kTileInputs == 0 || args.weight->block_cols >= args.weight->cols;
  if (is_scaled && !has_whole_blocks) return linear_bf16(args);
  if (args.m == 0) return;
  const DenormalsAreZero mode;
  if (args.m <= kFewTokens) {
    return is_scaled ? linear_few<E4m3Groups>(args) : linear_few<Bf16Groups>(args);
  }
  if (!is_scaled) return linear_amx_of<Bf16Groups>(args);
  if (has_wide_blocks(*args.weight)) return linear_wide<E4m3Groups>(args);
  linear_amx_of<E4m3Groups>(args);
}

void probe_amx(int64_t n, float* out) {
  configure_tiles(kTileTokenRows);
  alignas(64) uint16_t ones[kTileRows * kTileInputs];  // [kTileRows, kTileInputs]
  for (uint16_t& one : ones) one = 0x3f80;
  TILE_LOAD(4, ones, 64);
  TILE_LOAD(5, ones, 64);
  TILE_LOAD(6, ones, 64);
  TILE_LOAD(7, ones, 64);
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t i = 0; i < n; ++i) {
    for (int repeat = 0; repeat < kProbeProducts / 4; ++repeat) {
      TILE_MULTIPLY(0, 4, 6);
      TILE_MULTIPLY(1, 4, 7);
      TILE_MULTIPLY(2, 5, 6);
      TILE_MULTIPLY(3, 5, 7);
    }
  }
  alignas(64) TileSums sums;
  take_sums<true, true>(sums);
  store(out, load(sums[0]));
  TILE_RELEASE();
}

}  // namespace
}  // namespace rodin
