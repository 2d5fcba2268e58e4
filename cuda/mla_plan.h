// How a step's attention is cut up, decided on the host from the step's index before any layer runs.
//
// A chunk is a run of tokens whose partial results fit the workspace; a tile is a run of (token, head) rows
// of one sequence with one split size. Neither changes a result.
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
  int row_tiles = 1;             // 16-row tiles of an MlaTile

  // max_tokens, max_partial_rows: of one chunk; the latter counts (token, head, split) triples.
  // Sequences of `is_skipped` [S] are left out.
  void fill(const StepIndex& host, int64_t num_heads, int64_t max_tokens, int64_t max_partial_rows,
            const std::vector<char>& is_skipped);
};

}  // namespace rodin::cuda
