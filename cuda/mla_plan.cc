#include "cuda/mla_plan.h"

#include <algorithm>

#include "ops/check.h"

namespace rodin::cuda {

namespace {

constexpr int kMostSpread = 2, kLeastSpread = -2;

// Few tiles are spread over the multiprocessors, many need not be.
int spread_of(int64_t num_tiles) {
  if (num_tiles <= 4) return kMostSpread;
  if (num_tiles <= 8) return 1;
  if (num_tiles < 64) return 0;
  return num_tiles < 128 ? -1 : kLeastSpread;
}

}  // namespace

int64_t MlaPlan::most_splits(int64_t max_context, bool has_spread) {
  int64_t most = 0;
  for (int step_spread = 0; step_spread <= (has_spread ? kMostSpread : 0); ++step_spread) {
    for (const int64_t context : {max_context, std::min<int64_t>(max_context, kMlaSpreadEnd)}) {
      const int32_t splits = mla_num_splits(static_cast<int32_t>(context - 1), step_spread);
      most = std::max<int64_t>(most, mla_padded_splits(splits, step_spread));
    }
  }
  return most;
}

void MlaPlan::fill(const StepIndex& host, const Limits& limits, const std::vector<char>& is_skipped) {
  const int64_t num_heads = limits.num_heads;
  tiles.clear();
  chunks.clear();
  int64_t most_tokens = 0;
  for (int64_t seq = 0; seq < host.num_seqs; ++seq) {
    if (!is_skipped[static_cast<size_t>(seq)])
      most_tokens = std::max<int64_t>(most_tokens, host.q_start[seq + 1] - host.q_start[seq]);
  }
  const int64_t most_rows = std::min(most_tokens * num_heads, limits.max_tile_rows);
  tile_rows = most_rows <= 16 ? 16 : most_rows <= 32 ? 32 : 64;
  spread = 0;
  if (limits.has_spread) {
    int64_t num_tiles = 0;
    for (int64_t seq = 0; seq < host.num_seqs; ++seq) {
      const int64_t rows = (host.q_start[seq + 1] - host.q_start[seq]) * num_heads;
      if (!is_skipped[static_cast<size_t>(seq)]) num_tiles += (rows + tile_rows - 1) / tile_rows;
    }
    spread = spread_of(num_tiles);
  }

  MlaChunk chunk;
  const auto close_chunk = [&] {
    chunk.num_tiles = static_cast<int32_t>(tiles.size()) - chunk.first_tile;
    if (chunk.num_tokens > 0) chunks.push_back(chunk);
    chunk = {chunk.first_token + chunk.num_tokens, 0, static_cast<int32_t>(tiles.size()), 0, 0};
  };
  // Tokens begin .. end - 1 of the step, all of sequence `seq` and of one split size.
  const auto add_tiles = [&](int64_t seq, int64_t begin, int64_t end) {
    const int64_t first = (begin - host.q_start[seq]) * num_heads;
    const int64_t last = (end - host.q_start[seq]) * num_heads;
    for (int64_t row = first; row < last; row += tile_rows) {
      const int64_t count = std::min<int64_t>(tile_rows, last - row);
      const int32_t first_token = host.q_start[seq];
      const int32_t position = host.cache_positions[first_token + (row + count - 1) / num_heads];
      tiles.push_back({.seq = static_cast<int32_t>(seq),
                       .row_begin = static_cast<int32_t>(row),
                       .num_rows = static_cast<int32_t>(count),
                       .max_position = position,
                       .split_shift = mla_split_shift(position, spread),
                       .first_token = first_token,
                       .first_position = host.cache_positions[first_token],
                       .table_start = host.block_table_start[seq]});
    }
  };

  for (int64_t seq = 0; seq < host.num_seqs; ++seq) {
    if (is_skipped[static_cast<size_t>(seq)]) {
      close_chunk();
      chunk.first_token = host.q_start[seq + 1];
      continue;
    }
    int64_t begin = host.q_start[seq];  // of the tokens not in a tile yet
    for (int64_t token = begin; token < host.q_start[seq + 1]; ++token) {
      const int32_t position = host.cache_positions[token];
      const int32_t num_splits = mla_padded_splits(mla_num_splits(position, spread), spread);
      const int64_t splits = std::max(chunk.max_splits, num_splits);
      if (chunk.num_tokens > 0 && (chunk.num_tokens + 1 > limits.max_tokens ||
                                   (chunk.num_tokens + 1) * num_heads * splits > limits.max_partial_rows)) {
        add_tiles(seq, begin, token);
        begin = token;
        close_chunk();
      } else if (token > begin &&
                 mla_split_shift(position, spread) != mla_split_shift(host.cache_positions[token - 1], spread)) {
        add_tiles(seq, begin, token);
        begin = token;
      }
      chunk.num_tokens += 1;
      chunk.max_splits = std::max(chunk.max_splits, num_splits);
      check(chunk.num_tokens * num_heads * chunk.max_splits <= limits.max_partial_rows, "a context of ",
            position + 1, " tokens is longer than the attention workspace was made for");
    }
    add_tiles(seq, begin, host.q_start[seq + 1]);
  }
  close_chunk();
}

}  // namespace rodin::cuda
