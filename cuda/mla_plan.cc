#include "cuda/mla_plan.h"

#include <algorithm>
#include <cmath>

#include "ops/check.h"

namespace rodin::cuda {

namespace {

constexpr int kMostSpread = 2, kLeastSpread = -3;

// Splits that a launch has room for: a power of two from what 8192 keys need on, so that steps with contexts
// of any length up to there have one shape.
int32_t padded_splits(int32_t num_splits, int spread) {
  int32_t padded = spread > 0 ? 8 << spread : 8 >> -spread;
  while (padded < num_splits) padded *= 2;
  return padded;
}

// The tiles of a step before they are cut up.
struct Load {
  int64_t num_tiles = 0;
  int64_t longest = 0, sum = 0;  // keys
};

// What they take at a spread, in keys that one multiprocessor works on: as many turns of all multiprocessors
// as tiles of one length need; where lengths differ, the mean and one split more. What a split costs beside
// its keys, its results' bytes above all, is a share of the longest tile's, seen on an H200.
double cost_of(const Load& load, int spread, int tile_rows, int64_t num_multiprocessors) {
  const double splits = std::ldexp(8.0, spread), num_blocks = static_cast<double>(num_multiprocessors);
  const auto num_tiles = static_cast<double>(load.num_tiles), longest = static_cast<double>(load.longest);
  const auto sum = static_cast<double>(load.sum);
  const bool is_even = longest * num_tiles <= 1.1 * sum;
  const double keys = is_even ? std::ceil(num_tiles * splits / num_blocks) / splits * longest
                              : sum / num_blocks + longest / splits;
  return keys * (1 + splits * (tile_rows > 32 ? 0.06 : 0.03));
}

int spread_of(const Load& load, int tile_rows, int64_t num_multiprocessors) {
  int best = kMostSpread;
  for (int spread = kMostSpread - 1; spread >= kLeastSpread; --spread) {
    if (cost_of(load, spread, tile_rows, num_multiprocessors) <
        cost_of(load, best, tile_rows, num_multiprocessors))
      best = spread;
  }
  return best;
}

}  // namespace

int64_t MlaPlan::most_splits(int64_t max_context, bool has_spread) {
  int64_t most = 0;
  for (int step_spread = 0; step_spread <= (has_spread ? kMostSpread : 0); ++step_spread) {
    for (const int64_t context : {max_context, std::min<int64_t>(max_context, kMlaSpreadEnd)}) {
      const int32_t splits = mla_num_splits(static_cast<int32_t>(context - 1), step_spread);
      most = std::max<int64_t>(most, padded_splits(splits, step_spread));
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
    Load load;
    for (int64_t seq = 0; seq < host.num_seqs; ++seq) {
      const int64_t num_tokens = host.q_start[seq + 1] - host.q_start[seq];
      if (is_skipped[static_cast<size_t>(seq)] || num_tokens == 0) continue;
      const int64_t num_tiles = (num_tokens * num_heads + tile_rows - 1) / tile_rows;
      const int64_t num_keys = host.cache_positions[host.q_start[seq + 1] - 1] + 1;
      load.num_tiles += num_tiles;
      load.longest = std::max(load.longest, num_keys);
      load.sum += num_tiles * num_keys;
    }
    if (load.num_tiles > 0) spread = spread_of(load, tile_rows, limits.num_multiprocessors);
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
      const int32_t num_splits = padded_splits(mla_num_splits(position, spread), spread);
      const int64_t splits = std::max(chunk.max_splits, num_splits);
      if (chunk.num_tokens > 0 && (chunk.num_tokens + 1 > limits.max_tokens ||
                                   (chunk.num_tokens + 1) * num_heads * splits > limits.max_partial_rows)) {
        add_tiles(seq, begin, token);
        begin = token;
        close_chunk();
      } else if (token > begin && mla_split_shift(position, spread) !=
                                      mla_split_shift(host.cache_positions[token - 1], spread)) {
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
