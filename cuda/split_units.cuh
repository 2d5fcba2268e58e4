// What linear_split.cu walks over and through: units of 64 weight rows by a tile of tokens, the ring of
// stages, where things lie in shared memory.
#pragma once

#include "cuda/hopper.cuh"

namespace rodin::cuda {

constexpr int kSplitStageWeights = kSplitRows * kBlockK;  // bytes
constexpr int kSplitSumPitch = 72;                        // floats from one token to the next

// Offsets from the stages' base, where the weights are.
struct SplitLayout {
  int inputs, input_scales, weight_scales, sums, barriers, bytes;
};

__host__ __device__ constexpr int input_scale_bytes(int tokens) { return (tokens + kSplitScaleMargin) * 4; }
__host__ __device__ constexpr int input_scale_pitch(int tokens) {
  return (input_scale_bytes(tokens) + 127) / 128 * 128;
}

__host__ __device__ constexpr SplitLayout split_layout(int tokens, int stages) {
  SplitLayout l = {};
  l.inputs = stages * kSplitStageWeights;
  l.input_scales = l.inputs + stages * 2 * tokens * kBlockK;
  l.weight_scales = l.input_scales + stages * input_scale_pitch(tokens);
  l.sums = l.weight_scales + stages * 8;
  l.barriers = l.sums + 2 * tokens * kSplitSumPitch * 4;
  l.bytes = l.barriers + 2 * stages * 8 + 1024;  // 1024: to align the base
  return l;
}

// ---- units ----------------------------------------------------------------------------------------------

struct SplitUnit {
  int first;  // row of the inputs
  int count;
  int expert;
  int io;
  int row0;  // of the weights
};

// The units of this block of threads, one after the other. Their tiles are read a turn ahead.
template <int kTokens, bool kGated>
struct SplitUnits {
  static constexpr int kRows = kGated ? kSplitRows / 2 : kSplitRows;
  const SplitParams& p;
  int turn = 0;
  int row_units[2];  // [2]
  int tiles;         // plain
  int shared = 0;    // grouped: units of the shared expert
  int total;
  MoeTile tile = {};  // of the turn to come, where that is not the shared expert's

  __device__ explicit SplitUnits(const SplitParams& params) : p(params) {
    row_units[0] = (p.max_rows[0] + kRows - 1) / kRows;
    row_units[1] = (p.max_rows[1] + kRows - 1) / kRows;
    tiles = (p.num_tokens + kTokens - 1) / kTokens;
    if (p.map_table[0] != nullptr) {
      shared = p.num_shared_tiles * row_units[1];
      look_ahead();
      total = shared + (__shfl_sync(kAllLanes, *p.plan.num_tiles, 0) - p.num_shared_tiles) * row_units[0];
    } else {
      total = tiles * (row_units[0] + row_units[1]);
    }
  }
  // Every other turn runs backwards, so that who began with a long unit gets no second one of the longer
  // kind.
  __device__ int index_of(int at) const {
    const int stride = gridDim.x, own = blockIdx.x;
    return at * stride + (at % 2 ? stride - 1 - own : own);
  }
  __device__ bool next(SplitUnit& unit) {
    const int i = index_of(turn);
    ++turn;
    if (p.map_table[0] == nullptr) {
      if (i >= total) return false;
      const int row_unit = i / tiles;
      unit.io = row_unit >= row_units[0];
      unit.expert = 0;
      unit.first = i % tiles * kTokens;
      unit.count = min(kTokens, p.num_tokens - unit.first);
      unit.row0 = (row_unit - (unit.io ? row_units[0] : 0)) * kRows;
      return true;
    }
    if (i < shared) {  // the shared expert first: which weights it has is known
      const int index = i / row_units[1];
      unit = {index * kTokens, min(kTokens, p.num_tokens - index * kTokens), p.num_experts, 1,
              (i - index * row_units[1]) * kRows};
      look_ahead();
      return true;
    }
    if (i >= total) return false;
    // Lane 0's, which the compiler takes as uniform.
    unit = {__shfl_sync(kAllLanes, tile.first, 0), __shfl_sync(kAllLanes, tile.count, 0),
            __shfl_sync(kAllLanes, tile.expert, 0), 0, (i - shared) % row_units[0] * kRows};
    look_ahead();
    return true;
  }
  __device__ void look_ahead() {
    const int i = index_of(turn);
    if (i >= shared) tile = p.plan.tiles[min((i - shared) / row_units[0], p.max_tiles - 1)];
  }
  __device__ int num_blocks(const SplitUnit& unit) const { return (p.cols[unit.io] + kBlockK - 1) / kBlockK; }
};

struct SplitRing {
  uint32_t base;
  uint32_t barriers;  // full [stages], empty [stages]
  int stages;
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int count = 1) {
    stage += count;
    if (stage >= stages) stage -= stages, parity ^= 1;
  }
  __device__ uint32_t weights() const { return base + stage * kSplitStageWeights; }
  __device__ uint32_t full() const { return barriers + stage * 8; }
  __device__ uint32_t empty() const { return barriers + (stages + stage) * 8; }
};

}  // namespace rodin::cuda
