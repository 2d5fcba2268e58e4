// Products of more tokens with packed FP8 weights by AMX tiles. Two panels of 16 outputs meet up to
// kPassTokens tokens in one pass, a block of inputs, of one scale each, at a time:
//   widen:    a block's codes become tiles of bf16 in the nearest cache, once for all tokens
//   multiply: 32 tokens by 2 panels at a time, in 4 tiles of sums
//   promote:  those sums times the block's scale are added to the outputs' sums in memory
// One after another: what a block touches has to stay in the nearest cache, which it does with one buffer of
// each kind. Slices of the next block's widening between the products need two, and were slower by a fifth.
#pragma once

#include "ops/cpu/kernels_amx_few.h"
#include "ops/cpu/tile_ops.h"

namespace rodin {
namespace {

constexpr int64_t kPassTokens = 256;
// Inputs of a pass's tokens, so that they stay in the second cache from one pass to the next.
constexpr int64_t kPassInputs = 768 * 1024;
constexpr int64_t kPassPanels = 2;
constexpr int64_t kPassOutputs = kPassPanels * kPanelOutputs;
constexpr int64_t kBlockSteps = 4;  // steps of 32 inputs that a block has at most
constexpr int64_t kStepGroups = kTileInputs / kPackInputs;

// Working memory of a pass, in LinearArgs::panel.
struct PassMemory {
  alignas(64) char tiles[kPassPanels][kBlockSteps][kTileBytes];  // [panels, steps, ...]
  alignas(64) float part[2 * kTileRows][kPassOutputs];           // [tokens, outputs] over a block
  alignas(64) float sums[kPassTokens][kPassOutputs];             // [tokens, outputs]
};
static_assert(sizeof(PassMemory) <= kMinPanelFloats * sizeof(float));

// Of a tile that has `count` groups, zeros after them.
template <class Groups>
[[gnu::noinline]] void widen_slowly(const Groups& groups, const char* from, int64_t count, uint32_t marks,
                                    char* to) {
  for (int64_t i = 0; i < kStepGroups; ++i) {
    Wide wide = {(__m512bh)_mm512_setzero_si512(), (__m512bh)_mm512_setzero_si512()};
    if (i < count) wide = groups.read(from + i * Groups::kBytes, marks >> i & 1);
    _mm512_store_si512(to + i * 128, (__m512i)wide.first);
    _mm512_store_si512(to + i * 128 + 64, (__m512i)wide.second);
  }
}

// The group `first` of panel `index`, which lies at `panel`, and those after it as `steps` tiles; the panel
// has `end` groups.
template <class Groups>
inline void widen_block(const Groups& groups, int64_t index, const char* panel, int64_t first, int64_t end,
                        int64_t steps, char (*tiles)[kTileBytes]) {
  for (int64_t step = 0; step < steps; ++step, first += kStepGroups) {
    const char* from = panel + first * Groups::kBytes;
    char* to = tiles[step];
    const uint32_t marks = groups.marks(index, first) & 0xff;
    if (marks != 0 || end - first < kStepGroups) {
      widen_slowly(groups, from, end - first, marks, to);
      continue;
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kStepGroups; ++i) {
      const Wide wide = groups.read(from + i * Groups::kBytes, false);
      _mm512_store_si512(to + i * 128, (__m512i)wide.first);
      _mm512_store_si512(to + i * 128 + 64, (__m512i)wide.second);
    }
  }
}

// Asks for the memory that a block has ahead, some lines of each panel with every step.
struct LinesAhead {
  const char* line[kPassPanels];  // [kPassPanels]
  int64_t num_left;
  int64_t a_step;

  void ask() {
    for (int64_t i = min_of(a_step, num_left); i > 0; --i, --num_left) {
      for (const char*& at : line) {
        _mm_prefetch(at, _MM_HINT_T1);
        at += 64;
      }
    }
  }
};

// Tiles: 0, 1 sums of 16 tokens; 2, 3 of 16 more; 4, 5 inputs of either; 6, 7 weights of two panels.
inline void configure_pass(int64_t num_tokens) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? min_of(num_tokens, kTileRows) : kTileRows);
    config.row_bytes[tile] = 64;
  }
  TILE_CONFIG(&config);
}

// The sums of one or two tiles of tokens and one or two panels over a block of `steps`, to `part`. Tiles are
// loaded as soon as they are free, and zeroed before: on a busy machine there are times when a load else
// waits for the products before it, perhaps as two threads share a core's tiles.
template <bool kTwoTiles, bool kTwoPanels>
inline void multiply_block(const uint16_t* const* x, int64_t row_bytes, int64_t steps, LinesAhead& ahead,
                           PassMemory& memory) {
  const auto load_weights = [&](int64_t step) {
    TILE_ZERO(6);
    TILE_LOAD(6, memory.tiles[0][step], 64);
  };
  const auto load_rest = [&](int64_t step) {
    if constexpr (kTwoPanels) {
      TILE_ZERO(7);
      TILE_LOAD(7, memory.tiles[1][step], 64);
    }
    if constexpr (kTwoTiles) {
      TILE_ZERO(5);
      TILE_LOAD(5, x[1] + step * kTileInputs, row_bytes);
    }
  };
  TILE_ZERO(4);
  TILE_LOAD(4, x[0], row_bytes);
  load_weights(0);
  load_rest(0);
  for (int64_t step = 0; step < steps; ++step) {
    const bool is_last = step + 1 == steps;
    TILE_MULTIPLY(0, 4, 6);
    if constexpr (kTwoPanels) TILE_MULTIPLY(1, 4, 7);
    if (!is_last) {
      TILE_ZERO(4);
      TILE_LOAD(4, x[0] + (step + 1) * kTileInputs, row_bytes);
    }
    if constexpr (kTwoTiles) TILE_MULTIPLY(2, 5, 6);
    ahead.ask();
    if (!is_last) load_weights(step + 1);
    if constexpr (kTwoTiles && kTwoPanels) TILE_MULTIPLY(3, 5, 7);
    if (!is_last) load_rest(step + 1);
  }
  constexpr int64_t kStride = sizeof memory.part[0];
  TILE_STORE(0, &memory.part[0][0], kStride);
  TILE_ZERO(0);
  if constexpr (kTwoPanels) {
    TILE_STORE(1, &memory.part[0][kPanelOutputs], kStride);
    TILE_ZERO(1);
  }
  if constexpr (kTwoTiles) {
    TILE_STORE(2, &memory.part[kTileRows][0], kStride);
    TILE_ZERO(2);
    if constexpr (kTwoPanels) {
      TILE_STORE(3, &memory.part[kTileRows][kPanelOutputs], kStride);
      TILE_ZERO(3);
    }
  }
}

// Adds the part sums of `count` tokens, times their panels' scales, to the outputs' sums.
template <bool kTwoPanels, bool kIsFirst>
inline void promote(const float (*part)[kPassOutputs], const V (&by)[kPassPanels], int64_t count,
                    float (*sums)[kPassOutputs]) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t p = 0; p < (kTwoPanels ? 2 : 1); ++p) {
      float* sum = sums[i] + p * kPanelOutputs;
      store(sum, fma(by[p], load(part[i] + p * kPanelOutputs), kIsFirst ? zero() : load(sum)));
    }
  }
}

// The outputs of up to kPassPanels panels from `row` on for the tokens token .. token + num_tokens - 1.
template <class Groups, bool kTwoPanels>
[[gnu::noinline]] void wide_pass(const LinearArgs& args, const PackedRows& rows, int64_t row, int64_t token,
                                 int64_t num_tokens) {
  auto& memory = *reinterpret_cast<PassMemory*>(args.panel);
  constexpr int64_t kPanels = kTwoPanels ? 2 : 1;
  const int64_t panel_bytes = rows.inputs / kPackInputs * Groups::kBytes;
  const char* panel = static_cast<const char*>(args.weight->packed) + row / kPanelOutputs * panel_bytes;
  const uint16_t* x = args.x_bf16[token];
  const int64_t stride = args.m > 1 ? args.x_bf16[1] - args.x_bf16[0] : 0;
  const float* scale[kPassPanels] = {};  // [kPassPanels]
  for (int64_t p = 0; p < kPanels; ++p) {
    scale[p] = rows.scale + (row + p * kPanelOutputs) / rows.block_rows * rows.scale_cols;
  }
  constexpr int64_t kAhead = 4096;
  const AheadPanels<kPassPanels> ahead(args, row, panel, panel_bytes, kAhead);
  const Groups groups(rows);
  // The last tile of tokens begins early enough to be full; what the one before has is left out of it.
  const int64_t last = num_tokens > kTileRows ? num_tokens - kTileRows : 0;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  const int64_t num_blocks = ceil_div(rows.inputs, rows.block_inputs);
  const int64_t all_groups = rows.inputs / kPackInputs;
  const int64_t lines_a_step =
      ceil_div(kStepGroups * Groups::kBytes / 64, ceil_div(num_tokens, 2 * kTileRows));
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t begin = block * rows.block_inputs;
    const int64_t steps = ceil_div(min_of(rows.block_inputs, rows.inputs - begin), kTileInputs);
    const int64_t first_group = begin / kPackInputs;
    LinesAhead lines = {{}, steps * kStepGroups * Groups::kBytes / 64, lines_a_step};
    for (int64_t p = 0; p < kPassPanels; ++p) {
      const int64_t q = min_of(p, kPanels - 1);
      lines.line[p] = ahead.base(q, first_group * Groups::kBytes) + first_group * Groups::kBytes;
      if (p == q) {
        widen_block(groups, row / kPanelOutputs + p, panel + p * panel_bytes, first_group, all_groups, steps,
                    memory.tiles[p]);
      }
    }
    TILE_FENCE();
    V by[kPassPanels];
    for (int64_t p = 0; p < kPassPanels; ++p)
      by[p] = set1(p < kPanels ? scale[p][block] * Groups::kFactor : 0);
    for (int64_t first = 0; first < num_tokens; first += 2 * kTileRows) {
      const int64_t at[2] = {min_of(first, last), min_of(first + kTileRows, last)};          // [2]
      const uint16_t* inputs[2] = {x + at[0] * stride + begin, x + at[1] * stride + begin};  // [2]
      const bool has_two = first + kTileRows < num_tokens;
      if (has_two) {
        multiply_block<true, kTwoPanels>(inputs, stride * 2, steps, lines, memory);
      } else {
        multiply_block<false, kTwoPanels>(inputs, stride * 2, steps, lines, memory);
      }
      TILE_FENCE();
      for (int64_t i = 0; i < (has_two ? 2 : 1); ++i) {
        const int64_t begin_token = first + i * kTileRows;
        const int64_t skip = begin_token - at[i];
        const auto* part = memory.part + i * kTileRows + skip;
        const int64_t count = min_of(kTileRows, num_tokens - at[i]) - skip;
        if (block == 0) {
          promote<kTwoPanels, true>(part, by, count, memory.sums + begin_token);
        } else {
          promote<kTwoPanels, false>(part, by, count, memory.sums + begin_token);
        }
      }
    }
  }
  for (int64_t p = 0; p < kPanels; ++p) {
    const PanelOutputs outputs(args, row + p * kPanelOutputs);
    for (int64_t t = 0; t < num_tokens; ++t) {
      outputs.store(token + t, load(memory.sums[t] + p * kPanelOutputs));
    }
  }
}

// Whether the blocks of a weight's scales are whole steps, and so few that a pass has room for one.
inline bool has_wide_blocks(const Weight& weight) {
  const PackedRows rows(weight);
  if (rows.block_inputs > kBlockSteps * kTileInputs) return false;
  return rows.block_inputs % kTileInputs == 0 || rows.block_inputs >= rows.inputs;
}

// Any number of tokens; tokens in the outer loop, so that their inputs stay in the second cache.
template <class Groups>
inline void linear_wide(const LinearArgs& args) {
  const PackedRows rows(*args.weight);
  const int64_t most = kPassInputs / rows.inputs / kTileRows * kTileRows;
  const int64_t per_pass = min_of(kPassTokens, most > 2 * kTileRows ? most : 2 * kTileRows);
  configure_pass(args.m);
  int64_t num_tokens = 0;
  for (int64_t token = 0; token < args.m; token += num_tokens) {
    const int64_t left = args.m - token;
    // The last pass has a whole tile of tokens too, unless there is no other.
    num_tokens = left <= per_pass ? left : left - per_pass < kTileRows ? per_pass - kTileRows : per_pass;
    const int64_t end = args.row0 + args.rows;
    for (int64_t row = args.row0; row < end; row += kPassOutputs) {
      if (row + kPanelOutputs < end) {
        wide_pass<Groups, true>(args, rows, row, token, num_tokens);
      } else {
        wide_pass<Groups, false>(args, rows, row, token, num_tokens);
      }
    }
  }
  TILE_RELEASE();
}

}  // namespace
}  // namespace rodin
