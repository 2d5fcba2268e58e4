// Where the keys of one tile lie in the cache.
#pragma once

#include <algorithm>

#include "ops/cpu/kernels.h"
#include "ops/ops.h"

namespace rodin {

// Keys of a tile at absolute positions that a token attends to: first .. end - 1 of it. A key before the
// first or after the last stands for the nearest of them.
struct KeyTile {
  const uint16_t* keys[kKeyTile];  // [kKeyTile] cache rows
  int64_t first;
  int64_t end;
};

inline int64_t num_key_tiles(const StepIndex& index, int64_t token) {
  return index.cache_positions[token] / kKeyTile + 1;
}

inline KeyTile key_tile(const StepIndex& index, const CacheLayer& cache, int64_t token, int64_t tile) {
  const int64_t begin = tile * kKeyTile;
  KeyTile result;
  result.first = std::max<int64_t>(index.first_position - begin, 0);
  result.end = std::min<int64_t>(kKeyTile, index.cache_positions[token] + 1 - begin);
  const int32_t* blocks = index.block_table + index.block_table_start[index.seq_of_token[token]];
  int64_t block = (begin + result.first) / index.block_size;
  int64_t offset = (begin + result.first) % index.block_size;
  for (int64_t j = result.first; j < result.end; ++j, ++offset) {
    if (offset == index.block_size) {
      offset = 0;
      ++block;
    }
    result.keys[j] = cache.latents.row<uint16_t>(blocks[block] * index.block_size + offset);
  }
  std::fill(result.keys, result.keys + result.first, result.keys[result.first]);
  std::fill(result.keys + result.end, result.keys + kKeyTile, result.keys[result.end - 1]);
  return result;
}

}  // namespace rodin
