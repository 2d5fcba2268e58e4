#include "cuda/mla_plan.h"

#include <algorithm>

#include "ops/check.h"

namespace rodin::cuda {

void MlaPlan::fill(const StepIndex& host, int64_t num_heads, int64_t max_tokens, int64_t max_partial_rows,
                   const std::vector<char>& is_skipped) {
  tiles.clear();
  chunks.clear();
  int64_t most_tokens = 0;
  for (int64_t seq = 0; seq < host.num_seqs; ++seq) {
    if (!is_skipped[static_cast<size_t>(seq)])
      most_tokens = std::max<int64_t>(most_tokens, host.q_start[seq + 1] - host.q_start[seq]);
  }
  const int64_t most_rows = most_tokens * num_heads;
  row_tiles = most_rows <= 16 ? 1 : most_rows <= 32 ? 2 : 4;
  const int64_t tile_rows = 16 * row_tiles;

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
      const int64_t count = std::min(tile_rows, last - row);
      const int32_t position = host.cache_positions[host.q_start[seq] + (row + count - 1) / num_heads];
      tiles.push_back({static_cast<int32_t>(seq),
                       static_cast<int32_t>(row),
                       static_cast<int32_t>(count),
                       position,
                       mla_split_shift(position),
                       {}});
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
      const int32_t num_splits = mla_padded_splits(mla_num_splits(position));
      const int64_t splits = std::max(chunk.max_splits, num_splits);
      if (chunk.num_tokens > 0 && (chunk.num_tokens + 1 > max_tokens ||
                                   (chunk.num_tokens + 1) * num_heads * splits > max_partial_rows)) {
        add_tiles(seq, begin, token);
        begin = token;
        close_chunk();
      } else if (token > begin &&
                 mla_split_shift(position) != mla_split_shift(host.cache_positions[token - 1])) {
        add_tiles(seq, begin, token);
        begin = token;
      }
      chunk.num_tokens += 1;
      chunk.max_splits = std::max(chunk.max_splits, num_splits);
      check(chunk.num_tokens * num_heads * chunk.max_splits <= max_partial_rows, "a context of ",
            position + 1, " tokens is longer than the attention workspace was made for");
    }
    add_tiles(seq, begin, host.q_start[seq + 1]);
  }
  close_chunk();
}

}  // namespace rodin::cuda
