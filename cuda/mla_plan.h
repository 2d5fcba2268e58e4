// How a step's attention is cut up, decided on the host from the step's index before any layer runs.
//
// A chunk is a run of tokens whose partial results fit the workspace; a tile is a run of (token, head) rows
// of one sequence with one split size. Neither changes a result; the spread of the splits changes roundings.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/kernels.h"
#include "ops/ops.h"

namespace rodin::cuda {

struct MlaChunk {
  int32_t first_token = 0;
  int32_t num_tokens = 0;
  int32_t first_tile = 0;
  int32_t num_tiles = 0;
  int32_t max_splits = 0;
};

struct MlaPlan {
  std::vector<MlaTile> tiles;    // [num_tiles]
  std::vector<MlaChunk> chunks;  // [num_chunks]
  int tile_rows = 16;            // most rows of an MlaTile
  int spread = 0;                // of the splits (mla_split_shift)

  // What does not change from step to step.
  struct Limits {
    int64_t num_heads = 0;
    int64_t max_tokens = 0;        // of one chunk
    int64_t max_partial_rows = 0;  // of one chunk: (token, head, split) triples
    int64_t max_tile_rows = 16;    // 16, 32 or 64
    bool has_spread = false;       // splits depend on the step's tiles
    int64_t num_multiprocessors = 1;
  };

  // Splits of one token for which the workspace must have room.
  static int64_t most_splits(int64_t max_context, bool has_spread);
  // Sequences of `is_skipped` [S] are left out.
  void fill(const StepIndex& host, const Limits& limits, const std::vector<char>& is_skipped);
};

}  // namespace rodin::cuda
