// Products of more tokens with packed FP8 weights by AMX tiles. Two panels of 16 outputs meet up to
// kPassTokens tokens in one pass, a block of inputs, of one scale each, at a time:
//   widen:    a block's codes become tiles of bf16 in the nearest cache, once for all tokens
//   multiply: 32 tokens by 2 panels at a time, in 4 tiles of sums
//   promote:  those sums times the block's scale are added to the outputs' sums in memory
// A tile's product takes 16 cycles in which the vector units would be idle: the next block is widened, and
// the sums before are promoted, in slices between the products, and the memory after that is asked for.
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
  alignas(64) char tiles[2][kPassPanels][kBlockSteps][kTileBytes];  // [2 blocks in turns, panels, steps, ...]
  alignas(64) float sums[kPassTokens][kPassOutputs];                // [tokens, outputs]
};
static_assert(sizeof(PassMemory) <= kMinPanelFloats * sizeof(float));

// Sums of 32 tokens and 2 panels over a block.
struct PartSums {
  alignas(64) float at[2 * kTileRows][2 * kPanelOutputs];  // [tokens, outputs]
};

// Widens a block of some panels, tile by tile.
template <class Groups>
class Widener {
 public:
  Widener(const PackedRows& rows, int64_t first_panel, const char* panel, int64_t panel_bytes,
          int64_t num_panels, const AheadPanels<kPassPanels>& ahead)
      : groups_(rows),
        ahead_(ahead),
        panel_(panel),
        panel_bytes_(panel_bytes),
        first_panel_(first_panel),
        num_panels_(num_panels),
        all_groups_(rows.inputs / kPackInputs) {}
  // The `steps` whose groups are `first` and after, to the tiles `to` [kPassPanels, kBlockSteps].
  void start(int64_t first, int64_t steps, char* to) {
    first_ = first;
    steps_ = steps;
    to_ = to;
    at_panel_ = at_step_ = 0;
    left_ = num_panels_ * steps;
  }
  void widen(int64_t count) {
    for (; count > 0 && left_ > 0; --count, --left_) {
      widen_tile();
      if (++at_step_ < steps_) continue;
      at_step_ = 0;
      ++at_panel_;
    }
  }
  void finish() { widen(left_); }
  int64_t num_left() const { return left_; }

 private:
  void widen_tile() {
    const int64_t first = first_ + at_step_ * kStepGroups;
    const int64_t at = first * Groups::kBytes;
    const char* from = panel_ + at_panel_ * panel_bytes_ + at;
    const char* ahead = ahead_.base(at_panel_, first_ * Groups::kBytes) + at;
    char* to = to_ + (at_panel_ * kBlockSteps + at_step_) * kTileBytes;
    const uint32_t marks = groups_.marks(first_panel_ + at_panel_, first) & 0xff;
    const int64_t count = all_groups_ - first;
    if (marks != 0 || count < kStepGroups) return widen_slowly(from, count, marks, to);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kStepGroups; ++i) {
      _mm_prefetch(ahead + i * Groups::kBytes, _MM_HINT_T1);
      const Wide wide = groups_.read(from + i * Groups::kBytes, false);
      _mm512_store_si512(to + i * 128, (__m512i)wide.first);
      _mm512_store_si512(to + i * 128 + 64, (__m512i)wide.second);
    }
  }
  // Of a tile that has `count` groups, zeros after them.
  [[gnu::noinline]] void widen_slowly(const char* from, int64_t count, uint32_t marks, char* to) const {
    for (int64_t i = 0; i < kStepGroups; ++i) {
      Wide wide = {(__m512bh)_mm512_setzero_si512(), (__m512bh)_mm512_setzero_si512()};
      if (i < count) wide = groups_.read(from + i * Groups::kBytes, marks >> i & 1);
      _mm512_store_si512(to + i * 128, (__m512i)wide.first);
      _mm512_store_si512(to + i * 128 + 64, (__m512i)wide.second);
    }
  }

  const Groups groups_;
  const AheadPanels<kPassPanels>& ahead_;
  const char* const panel_;
  const int64_t panel_bytes_, first_panel_, num_panels_, all_groups_;
  int64_t first_ = 0, steps_ = 0;
  char* to_ = nullptr;
  int64_t at_panel_ = 0, at_step_ = 0, left_ = 0;
};

// Adds part sums, times their panels' scales, to the outputs' sums, slice by slice.
class Promoter {
 public:
  // Tokens of a tile: some rows of part sums, and the sums of the first panel, which follow one another.
  struct Rows {
    const float* from = nullptr;
    float* to = nullptr;
    int64_t count = 0;
  };
  void start(const Rows& rows, const Rows& later, const float* scale, int64_t num_panels, bool is_first) {
    rows_ = rows;
    later_ = later;
    for (int p = 0; p < 2; ++p) by_[p] = scale[p] * E4m3Groups::kFactor;
    num_panels_ = num_panels;
    is_first_ = is_first;
  }
  void promote(int64_t count) {
    if (rows_.count == 0) {
      rows_ = later_;
      later_.count = 0;
    }
    count = min_of(count, rows_.count);
    if (count == 0) return;
    if (is_first_) {
      promote_rows<true>(count);
    } else {
      promote_rows<false>(count);
    }
  }
  void finish() {
    promote(kTileRows);
    promote(kTileRows);
  }

 private:
  template <bool kIsFirst>
  void promote_rows(int64_t count) {
    const V by[2] = {set1(by_[0]), set1(by_[1])};
    const float* from = rows_.from;
    float* to = rows_.to;
    for (int64_t i = 0; i < count; ++i, from += 2 * kPanelOutputs, to += kPassOutputs) {
      store(to, fma(by[0], load(from), kIsFirst ? zero() : load(to)));
      if (num_panels_ == 1) continue;
      float* second = to + kPanelOutputs;
      store(second, fma(by[1], load(from + kPanelOutputs), kIsFirst ? zero() : load(second)));
    }
    rows_ = {from, to, rows_.count - count};
  }

  Rows rows_, later_;
  float by_[2] = {0, 0};
  int64_t num_panels_ = 0;
  bool is_first_ = false;
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

template <bool kTwoTiles, bool kTwoPanels>
inline void multiply_step(const uint16_t* const* x, int64_t row_bytes, const char* weights) {
  TILE_LOAD(4, x[0], row_bytes);
  TILE_LOAD(6, weights, 64);
  TILE_MULTIPLY(0, 4, 6);
  if constexpr (kTwoPanels) {
    TILE_LOAD(7, weights + kBlockSteps * kTileBytes, 64);
    TILE_MULTIPLY(1, 4, 7);
  }
  if constexpr (kTwoTiles) {
    TILE_LOAD(5, x[1], row_bytes);
    TILE_MULTIPLY(2, 5, 6);
    if constexpr (kTwoPanels) TILE_MULTIPLY(3, 5, 7);
  }
}

template <bool kTwoTiles, bool kTwoPanels>
inline void take_part(PartSums& part) {
  constexpr int64_t kStride = sizeof part.at[0];
  TILE_STORE(0, &part.at[0][0], kStride);
  TILE_ZERO(0);
  if constexpr (kTwoPanels) {
    TILE_STORE(1, &part.at[0][kPanelOutputs], kStride);
    TILE_ZERO(1);
  }
  if constexpr (kTwoTiles) {
    TILE_STORE(2, &part.at[kTileRows][0], kStride);
    TILE_ZERO(2);
    if constexpr (kTwoPanels) {
      TILE_STORE(3, &part.at[kTileRows][kPanelOutputs], kStride);
      TILE_ZERO(3);
    }
  }
}

// The sums of one or two tiles of tokens and one or two panels over a block of `steps`.
template <bool kTwoTiles, bool kTwoPanels, class Groups>
inline void multiply_block(const uint16_t* const* x, int64_t row_bytes, const char* weights, int64_t steps,
                           Widener<Groups>& widener, int64_t tiles_a_step, Promoter& promoter,
                           PartSums& part) {
  const int64_t tokens_a_step = 2 * kTileRows / steps;
  for (int64_t step = 0; step < steps; ++step) {
    const uint16_t* inputs[2] = {x[0] + step * kTileInputs, x[1] + step * kTileInputs};
    multiply_step<kTwoTiles, kTwoPanels>(inputs, row_bytes, weights + step * kTileBytes);
    promoter.promote(tokens_a_step);
    widener.widen(tiles_a_step);
  }
  promoter.finish();
  take_part<kTwoTiles, kTwoPanels>(part);
}

// The outputs of up to kPassPanels panels from `row` on for the tokens token .. token + num_tokens - 1.
template <class Groups>
[[gnu::noinline]] void wide_pass(const LinearArgs& args, const PackedRows& rows, int64_t row, int64_t token,
                                 int64_t num_tokens) {
  auto& memory = *reinterpret_cast<PassMemory*>(args.panel);
  // In turns: what one product stores is promoted in the second after it, so that no load waits for a store.
  PartSums parts[2];      // [2]
  Promoter promoters[2];  // [2]
  const int64_t panel_bytes = rows.inputs / kPackInputs * Groups::kBytes;
  const int64_t end = args.row0 + args.rows;
  const int64_t num_panels = min_of(kPassPanels, ceil_div(end - row, kPanelOutputs));
  const char* panel = static_cast<const char*>(args.weight->packed) + row / kPanelOutputs * panel_bytes;
  const uint16_t* x = args.x_bf16[token];
  const int64_t stride = args.m > 1 ? args.x_bf16[1] - args.x_bf16[0] : 0;
  const int64_t num_blocks = ceil_div(rows.inputs, rows.block_inputs);
  const int64_t block_groups = rows.block_inputs / kPackInputs;
  const auto steps_of = [&](int64_t block) {
    return ceil_div(min_of(rows.block_inputs, rows.inputs - block * rows.block_inputs), kTileInputs);
  };
  constexpr int64_t kAhead = 4096;
  const AheadPanels<kPassPanels> ahead(args, row, panel, panel_bytes, kAhead);
  Widener<Groups> widener(rows, row / kPanelOutputs, panel, panel_bytes, num_panels, ahead);
  const auto start_block = [&](int64_t block) {
    widener.start(block * block_groups, steps_of(block), &memory.tiles[block % 2][0][0][0]);
  };
  // The last tile of tokens begins early enough to be full; what the one before has is left out of it.
  const int64_t num_tiles = ceil_div(num_tokens, kTileRows);
  const int64_t last = num_tokens > kTileRows ? num_tokens - kTileRows : 0;
  start_block(0);
  widener.finish();
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  int turn = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    TILE_FENCE();
    const int64_t steps = steps_of(block);
    const char* tiles = &memory.tiles[block % 2][0][0][0];
    if (block + 1 < num_blocks) start_block(block + 1);
    const int64_t num_slices = steps * ceil_div(num_tiles, 2) * ceil_div(num_panels, 2);
    const int64_t tiles_a_step = ceil_div(widener.num_left(), num_slices);
    const uint16_t* inputs = x + block * rows.block_inputs;
    for (int64_t tile = 0; tile < num_tiles; tile += 2) {
      const bool two_tiles = tile + 1 < num_tiles;
      const int64_t first0 = min_of(tile * kTileRows, last), first1 = min_of((tile + 1) * kTileRows, last);
      const uint16_t* at[2] = {inputs + first0 * stride, inputs + first1 * stride};  // [2]
      for (int64_t p = 0; p < num_panels; p += 2) {
        const bool two_panels = p + 1 < num_panels;
        const auto multiply = [&]<bool kTwoTiles, bool kTwoPanels>() {
          multiply_block<kTwoTiles, kTwoPanels>(at, stride * 2, tiles + p * kBlockSteps * kTileBytes, steps,
                                                widener, tiles_a_step, promoters[turn], parts[turn]);
        };
        if (two_tiles && two_panels) {
          multiply.template operator()<true, true>();
        } else if (two_tiles) {
          multiply.template operator()<true, false>();
        } else if (two_panels) {
          multiply.template operator()<false, true>();
        } else {
          multiply.template operator()<false, false>();
        }
        float scale[2] = {0, 0};  // [2]
        for (int64_t i = 0; i < (two_panels ? 2 : 1); ++i) {
          const int64_t at_row = row + (p + i) * kPanelOutputs;
          scale[i] = rows.scale[at_row / rows.block_rows * rows.scale_cols + block];
        }
        const auto rows_of = [&](int64_t t, int64_t first, int64_t part_row) {
          const int64_t skip = t * kTileRows - first;
          return Promoter::Rows{parts[turn].at[part_row + skip],
                                memory.sums[t * kTileRows] + p * kPanelOutputs,
                                min_of(kTileRows, num_tokens - first) - skip};
        };
        promoters[turn].start(rows_of(tile, first0, 0),
                              two_tiles ? rows_of(tile + 1, first1, kTileRows) : Promoter::Rows(), scale,
                              two_panels ? 2 : 1, block == 0);
        turn ^= 1;
      }
    }
    widener.finish();
  }
  promoters[turn].finish();
  promoters[turn ^ 1].finish();
  for (int64_t p = 0; p < num_panels; ++p) {
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
    for (int64_t row = args.row0; row < args.row0 + args.rows; row += kPassOutputs) {
      wide_pass<Groups>(args, rows, row, token, num_tokens);
    }
  }
  TILE_RELEASE();
}

}  // namespace
}  // namespace rodin
