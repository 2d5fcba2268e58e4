// Absorbed multi-head latent attention. The queries of all heads meet the cached latents themselves:
//   absorb: q_h W_UK,h * scale -> [lora_rank], beside the rotated part   (per head)
//   attend: tiles of kKeyTile keys at absolute positions, each with its own maximum and sum, combined in
//           rising order                                                 (per token and query_tile heads)
//   values: W_UV,h over the combined latents                             (per head)
// Tiles are computed one after another by one task, or spread over the workers and then combined: the same
// operations either way, so that decoding, a prefill chunk and a prefix hit give the same bits.
#include <algorithm>
#include <cstring>

#include "ops/cpu/cpu_ops.h"

namespace rodin {
namespace {

constexpr int64_t kMinTokensPerPart = 16;
// Elements from one row of Worker::rows_bf16 to the next.
int64_t bf16_stride(const MlaShape& shape) {
  return bf16_row_stride(std::max(shape.lora_rank, shape.nope_dim));
}

}  // namespace

struct CpuOps::Attention {
  const Tensor& q;
  const MlaWeights& mla;
  const StepIndex& index;
  const CacheLayer& cache;
  const Tensor& out;
  int64_t first_token;
  int64_t num_tokens;
  int64_t query_tile;

  int64_t num_heads() const { return mla.shape.num_heads; }
  int64_t tiles_per_token() const { return ceil_div(num_heads(), query_tile); }
  // Key tiles of a token of the chunk.
  int64_t num_key_tiles(int64_t token) const {
    return index.cache_positions[first_token + token] / kKeyTile + 1;
  }
  int64_t row(int64_t token, int64_t head) const { return token * num_heads() + head; }
  int64_t heads_in_tile(int64_t head) const { return std::min(query_tile, num_heads() - head); }
};

void CpuOps::mla_rope_store(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                            const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache) {
  const MlaShape& shape = mla.shape;
  const int64_t cost = shape.num_heads * shape.rope_dim + 2 * shape.latent_dim();
  for_parts(index.num_tokens, cost, [&](int64_t first, int64_t end, Worker&) {
    for (int64_t t = first; t < end; ++t) {
      const float* angles = rope_table.row<float>(t);
      for (int64_t head = 0; head < shape.num_heads; ++head) {
        float* rope_part = q.row<float>(t) + head * shape.qk_dim() + shape.nope_dim;
        apply_rope(rope_part, angles, shape.rope_dim, shape.rope_interleave);
      }
      if (!expanded_mla_) store_latent(t, kv, mla, eps, angles, index, cache);
    }
  });
  if (expanded_mla_) store_expanded(kv, mla, eps, rope_table, index, cache);
}

void CpuOps::mla_store(const Tensor& kv, const MlaWeights& mla, float eps, const Tensor& rope_table,
                       const StepIndex& index, const CacheLayer& cache) {
  if (expanded_mla_) return store_expanded(kv, mla, eps, rope_table, index, cache);
  for_parts(index.num_tokens, 2 * mla.shape.latent_dim(), [&](int64_t first, int64_t end, Worker&) {
    for (int64_t t = first; t < end; ++t) {
      store_latent(t, kv, mla, eps, rope_table.row<float>(t), index, cache);
    }
  });
}

void CpuOps::store_latent(int64_t token, const Tensor& kv, const MlaWeights& mla, float eps,
                          const float* angles, const StepIndex& index, const CacheLayer& cache) const {
  if (index.slots[token] < 0) return;
  const MlaShape& shape = mla.shape;
  float* latent = kv.row<float>(token);
  kernels_.rms_norm(latent, mla.kv_a_norm, eps, shape.lora_rank, latent);
  apply_rope(latent + shape.lora_rank, angles, shape.rope_dim, shape.rope_interleave);
  kernels_.to_cache(latent, shape.latent_dim(), cache.latents.row<uint16_t>(index.slots[token]));
}

void CpuOps::store_expanded(const Tensor& kv, const MlaWeights& mla, float eps, const Tensor& rope_table,
                            const StepIndex& index, const CacheLayer& cache) {
  if (std::all_of(index.slots, index.slots + index.num_tokens, [](int32_t slot) { return slot < 0; })) return;
  const Tensor latents = kv.slice_cols(0, mla.shape.lora_rank);
  rms_norm(latents, mla.kv_a_norm, eps, latents);
  linear(latents, mla.kv_b, expanded_mla_->products(index.num_tokens));
  expanded_mla_->store(kv, rope_table, index, cache);
}

void CpuOps::mla_attention(const Tensor& q, const MlaWeights& mla, const StepIndex& index,
                           const CacheLayer& cache, const Tensor& out) {
  if (expanded_mla_) return expanded_mla_->attention(q, index, cache, out);
  for (int64_t first = 0; first < index.num_tokens; first += chunk_tokens_) {
    const Attention at = {q,
                          mla,
                          index,
                          cache,
                          out,
                          first,
                          std::min(chunk_tokens_, index.num_tokens - first),
                          kernels_.query_tile};
    absorb_queries(at);
    const bool is_wide = at.num_tokens * at.tiles_per_token() >= 2 * pool_.num_threads();
    if (is_wide || pool_.num_threads() == 1 || index.max_context_len <= kKeyTile) {
      attend_rows_in_order(at);
    } else {
      attend_split(at);
    }
    apply_values(at);
  }
}

void CpuOps::absorb_queries(const Attention& at) {
  const MlaShape& shape = at.mla.shape;
  const int64_t wanted = ceil_div(2 * pool_.num_threads(), at.num_heads());
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, at.num_tokens / kMinTokensPerPart));
  const int64_t tokens = ceil_div(at.num_tokens, parts);
  pool_.parallel_for(at.num_heads() * parts, [&](int64_t task, int worker_id) {
    Worker& worker = workers_[static_cast<size_t>(worker_id)];
    const int64_t head = task / parts;
    const int64_t first = task % parts * tokens;
    const int64_t count = std::min(tokens, at.num_tokens - first);
    if (count <= 0) return;
    for (int64_t i = 0; i < count; ++i) {
      const float* query = at.q.row<float>(at.first_token + first + i) + head * shape.qk_dim();
      float* to = query_latents_ + at.row(first + i, head) * shape.latent_dim();
      worker.x[i] = query;
      worker.out[i] = to;
      kernels_.scale(query + shape.nope_dim, shape.softmax_scale, shape.rope_dim, to + shape.lora_rank);
    }
    if (const auto* packed = static_cast<const PackedMla*>(at.mla.packed)) {
      return absorb_packed(packed->keys[static_cast<size_t>(head)], shape, count, worker);
    }
    AbsorbArgs args;
    args.weight = &at.mla.kv_b;
    args.row0 = head * (shape.nope_dim + shape.v_dim);
    args.rows = shape.nope_dim;
    args.a = worker.x;
    args.out = worker.out;
    args.m = count;
    args.factor = shape.softmax_scale;
    args.scaled = worker.scaled;
    args.panel = worker.panel;
    kernels_.absorb(args);
  });
}

// The first `count` rows of worker.x, times the softmax scale, through a head's transposed W_UK to
// worker.out.
void CpuOps::absorb_packed(const Weight& key, const MlaShape& shape, int64_t count, Worker& worker) const {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t* row = worker.rows_bf16 + i * bf16_stride(shape);
    kernels_.scale(worker.x[i], shape.softmax_scale, shape.nope_dim, worker.scaled);
    kernels_.to_bf16(worker.scaled, shape.nope_dim, row);
    worker.x_bf16[i] = row;
  }
  LinearArgs args;
  args.weight = &key;
  args.rows = key.rows;
  args.x_bf16 = worker.x_bf16;
  args.out = worker.out;
  args.m = count;
  args.panel = worker.panel;
  kernels_.linear(args);
}

// The cache rows of a tile of keys of one token of the chunk; a key before the first or after the last that
// it attends to stands for the nearest that it does.
CpuOps::KeyTile CpuOps::key_tile(const Attention& at, int64_t token, int64_t tile) {
  const StepIndex& index = at.index;
  const int64_t t = at.first_token + token;
  const int64_t begin = tile * kKeyTile;
  KeyTile result;
  result.first = std::max<int64_t>(index.first_position - begin, 0);
  result.end = std::min<int64_t>(kKeyTile, index.cache_positions[t] + 1 - begin);
  const int32_t* blocks = index.block_table + index.block_table_start[index.seq_of_token[t]];
  int64_t block = (begin + result.first) / index.block_size;
  int64_t offset = (begin + result.first) % index.block_size;
  for (int64_t j = result.first; j < result.end; ++j, ++offset) {
    if (offset == index.block_size) {
      offset = 0;
      ++block;
    }
    result.keys[j] = at.cache.latents.row<uint16_t>(blocks[block] * index.block_size + offset);
  }
  std::fill(result.keys, result.keys + result.first, result.keys[result.first]);
  std::fill(result.keys + result.end, result.keys + kKeyTile, result.keys[result.end - 1]);
  return result;
}

// Tile `tile` of keys for the heads head .. head + heads_in_tile - 1 of one token of the chunk; `next` is a
// tile that is wanted soon, or null.
void CpuOps::attend_tile(const Attention& at, int64_t token, int64_t head, const KeyTile& tile,
                         const KeyTile* next, bool has_queries, Worker& worker, float* const* out, float* max,
                         float* sum) const {
  const MlaShape& shape = at.mla.shape;
  const float* queries[kMaxQueryTile];  // [kMaxQueryTile]
  AttendArgs args;
  args.num_rows = at.heads_in_tile(head);
  for (int64_t i = 0; i < args.num_rows; ++i) {
    queries[i] = query_latents_ + at.row(token, head + i) * shape.latent_dim();
  }
  args.q = queries;
  args.keys = tile.keys;
  args.first = tile.first;
  args.end = tile.end;
  args.next_keys = next ? next->keys : nullptr;
  args.latent_dim = shape.latent_dim();
  args.lora_rank = shape.lora_rank;
  args.scratch = worker.scratch_bf16;
  args.has_queries = has_queries;
  args.out = out;
  args.max = max;
  args.sum = sum;
  kernels_.attend(args);
}

void CpuOps::attend_rows_in_order(const Attention& at) {
  const int64_t rank = at.mla.shape.lora_rank;
  const int64_t num_tasks = at.num_tokens * at.tiles_per_token();
  pool_.parallel_for(num_tasks, [&](int64_t task, int worker_id) {
    Worker& worker = workers_[static_cast<size_t>(worker_id)];
    const int64_t token = task / at.tiles_per_token();
    const int64_t head = task % at.tiles_per_token() * kernels_.query_tile;
    const int64_t row = at.row(token, head);
    float* out[kMaxQueryTile];      // [kMaxQueryTile] running result
    float* part[kMaxQueryTile];     // [kMaxQueryTile] one tile's
    float part_max[kMaxQueryTile];  // [kMaxQueryTile]
    float part_sum[kMaxQueryTile];  // [kMaxQueryTile]
    for (int64_t i = 0; i < kernels_.query_tile; ++i) {
      out[i] = value_latents_ + (row + i) * rank;
      part[i] = worker.part + i * rank;
    }
    // What this worker is likely to take next.
    const int64_t next_token = (task + pool_.num_threads()) / at.tiles_per_token();
    const bool is_last = next_token >= at.num_tokens;
    KeyTile tiles[2];  // [2] the one in hand, the one after it
    tiles[0] = key_tile(at, token, 0);
    for (int64_t tile = 0; tile < at.num_key_tiles(token); ++tile) {
      const bool is_end = tile + 1 == at.num_key_tiles(token);
      const KeyTile& keys = tiles[tile % 2];
      KeyTile& next = tiles[(tile + 1) % 2];
      if (!is_end) next = key_tile(at, token, tile + 1);
      if (is_end && !is_last) next = key_tile(at, next_token, 0);
      const KeyTile* ahead = is_end && is_last ? nullptr : &next;
      if (tile == 0) {
        attend_tile(at, token, head, keys, ahead, false, worker, out, softmax_max_ + row, softmax_sum_ + row);
        continue;
      }
      attend_tile(at, token, head, keys, ahead, true, worker, part, part_max, part_sum);
      for (int64_t i = 0; i < at.heads_in_tile(head); ++i) {
        kernels_.combine(out[i], softmax_max_ + row + i, softmax_sum_ + row + i, part[i], part_max[i],
                         part_sum[i], rank);
      }
    }
  });
}

void CpuOps::attend_split(const Attention& at) {
  const int64_t rank = at.mla.shape.lora_rank;
  const int64_t num_rows = at.num_tokens * at.num_heads();
  const int64_t row_tiles = at.num_tokens * at.tiles_per_token();
  const int64_t all_tiles = (at.index.max_context_len - 1) / kKeyTile + 1;
  const int64_t wave_tiles = std::max<int64_t>(1, max_parts_ / num_rows);
  for (int64_t first = 0; first < all_tiles; first += wave_tiles) {
    const int64_t tiles = std::min(wave_tiles, all_tiles - first);
    // Part (tile, row) of the wave.
    pool_.parallel_for(row_tiles * tiles, [&](int64_t task, int worker_id) {
      Worker& worker = workers_[static_cast<size_t>(worker_id)];
      const int64_t tile = task / row_tiles;
      const int64_t token = task % row_tiles / at.tiles_per_token();
      const int64_t head = task % at.tiles_per_token() * kernels_.query_tile;
      if (first + tile >= at.num_key_tiles(token)) return;
      const int64_t part = tile * num_rows + at.row(token, head);
      float* out[kMaxQueryTile];  // [kMaxQueryTile]
      for (int64_t i = 0; i < kernels_.query_tile; ++i) out[i] = parts_ + (part + i) * rank;
      attend_tile(at, token, head, key_tile(at, token, first + tile), nullptr, false, worker, out,
                  parts_max_ + part, parts_sum_ + part);
    });
    for_parts(num_rows, tiles * rank, [&](int64_t first_row, int64_t end_row, Worker&) {
      for (int64_t row = first_row; row < end_row; ++row) {
        const int64_t end_tile = std::min(tiles, at.num_key_tiles(row / at.num_heads()) - first);
        float* to = value_latents_ + row * rank;
        for (int64_t tile = 0; tile < end_tile; ++tile) {
          const int64_t part = tile * num_rows + row;
          if (first + tile == 0) {
            memcpy(to, parts_ + part * rank, static_cast<size_t>(rank) * sizeof(float));
            softmax_max_[row] = parts_max_[part];
            softmax_sum_[row] = parts_sum_[part];
          } else {
            kernels_.combine(to, softmax_max_ + row, softmax_sum_ + row, parts_ + part * rank,
                             parts_max_[part], parts_sum_[part], rank);
          }
        }
      }
    });
  }
}

void CpuOps::apply_values(const Attention& at) {
  const MlaShape& shape = at.mla.shape;
  const int64_t wanted = ceil_div(2 * pool_.num_threads(), at.num_heads());
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, at.num_tokens / kMinTokensPerPart));
  const int64_t tokens = ceil_div(at.num_tokens, parts);
  pool_.parallel_for(at.num_heads() * parts, [&](int64_t task, int worker_id) {
    Worker& worker = workers_[static_cast<size_t>(worker_id)];
    const int64_t head = task / parts;
    const int64_t first = task % parts * tokens;
    const int64_t count = std::min(tokens, at.num_tokens - first);
    if (count <= 0) return;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = at.row(first + i, head);
      float* latent = value_latents_ + row * shape.lora_rank;
      kernels_.scale(latent, 1.0f / softmax_sum_[row], shape.lora_rank, latent);
      worker.x[i] = latent;
      if (at.mla.packed) {
        uint16_t* row = worker.rows_bf16 + i * bf16_stride(shape);
        kernels_.to_bf16(latent, shape.lora_rank, row);
        worker.x_bf16[i] = row;
      }
      worker.out[i] = at.out.row<float>(at.first_token + first + i) + head * shape.v_dim;
    }
    LinearArgs args;
    if (const auto* packed = static_cast<const PackedMla*>(at.mla.packed)) {
      args.weight = &packed->values[static_cast<size_t>(head)];
      args.x_bf16 = worker.x_bf16;
    } else {
      args.weight = &at.mla.kv_b;
      args.row0 = head * (shape.nope_dim + shape.v_dim) + shape.nope_dim;
    }
    args.rows = shape.v_dim;
    args.x = worker.x;
    args.out = worker.out;
    args.out_row0 = args.row0;
    args.m = count;
    args.panel = worker.panel;
    kernels_.linear(args);
  });
}

}  // namespace rodin
