#include "ops/cpu/cpu_gqa.h"

#include <algorithm>
#include <cstring>

namespace rodin {
namespace {

// Rows of a task: enough to read a tile of keys from the nearest cache only once.
constexpr int64_t kTaskRows = 16;
constexpr int64_t kMinParts = 1024;
// Elements that a task of rope_store should rotate.
constexpr int64_t kMinRopeWork = 16 * 1024;

}  // namespace

CpuGqa::CpuGqa(const Kernels& kernels, ThreadPool& pool, const GqaShape& shape, int64_t max_step_tokens)
    : kernels_(kernels),
      pool_(pool),
      shape_(shape),
      tile_tokens_(std::max<int64_t>(1, kTaskRows / shape.group_size())),
      tile_rows_(tile_tokens_ * shape.group_size()),
      workers_(static_cast<size_t>(pool.num_threads())) {
  tiles_.reserve(static_cast<size_t>(max_step_tokens));
  const auto num_rows = static_cast<size_t>(tile_rows_);
  for (Worker& worker : workers_) {
    worker.part_data.resize(num_rows * static_cast<size_t>(shape.head_dim));
    for (Rows* rows : {&worker.total, &worker.part}) {
      rows->q.resize(num_rows);
      rows->out.resize(num_rows);
      rows->max.resize(num_rows);
      rows->sum.resize(num_rows);
    }
  }
  // attention() splits only calls of fewer than 2 * num_threads pairs of a token tile and a kv head.
  max_parts_ = std::max(kMinParts, 2 * pool.num_threads() * tile_rows_);
  parts_.resize(static_cast<size_t>(max_parts_ * shape.head_dim));
  for (std::vector<float>* values : {&parts_max_, &parts_sum_, &total_max_, &total_sum_}) {
    values->resize(static_cast<size_t>(max_parts_));
  }
}

size_t CpuGqa::bytes() const {
  const size_t row_bytes =
      2 * (2 * sizeof(void*) + 2 * sizeof(float)) + sizeof(float) * static_cast<size_t>(shape_.head_dim);
  return workers_.size() * static_cast<size_t>(tile_rows_) * row_bytes +
         tiles_.capacity() * sizeof(TokenTile) + (parts_.size() + 4 * parts_max_.size()) * sizeof(float);
}

void CpuGqa::rope_store(const Tensor& q, const Tensor& kv, const Tensor& rope_table, const StepIndex& index,
                        const CacheLayer& cache) {
  const int64_t dim = shape_.head_dim;
  const int64_t tokens = ceil_div(kMinRopeWork, (shape_.num_heads + 2 * shape_.num_kv_heads) * dim);
  pool_.parallel_for(ceil_div(index.num_tokens, tokens), [&](int64_t task, int) {
    const int64_t end = std::min(index.num_tokens, (task + 1) * tokens);
    for (int64_t t = task * tokens; t < end; ++t) {
      const float* angles = rope_table.row<float>(t);
      float* query = q.row<float>(t);
      float* key = kv.row<float>(t);
      for (int64_t h = 0; h < shape_.num_heads; ++h) apply_rope(query + h * dim, angles, dim, false);
      if (index.slots[t] < 0) continue;
      for (int64_t g = 0; g < shape_.num_kv_heads; ++g) apply_rope(key + g * dim, angles, dim, false);
      kernels_.to_cache(key, shape_.row_dim(), cache.latents.row<uint16_t>(index.slots[t]));
    }
  });
}

void CpuGqa::attention(const Tensor& q, const StepIndex& index, const CacheLayer& cache, const Tensor& out) {
  tiles_.clear();
  for (int64_t s = 0; s < index.num_seqs; ++s) {
    const int64_t end = index.q_start[s + 1];
    for (int64_t first = index.q_start[s]; first < end; first += tile_tokens_) {
      tiles_.push_back({first, std::min(tile_tokens_, end - first)});
    }
  }
  const Call at = {q, index, cache, out};
  const auto num_tasks = static_cast<int64_t>(tiles_.size()) * shape_.num_kv_heads;
  const bool is_wide = num_tasks >= 2 * pool_.num_threads();
  if (is_wide || pool_.num_threads() == 1 || index.max_context_len <= kKeyTile) {
    attend_in_order(at);
  } else {
    attend_split(at);
  }
}

int64_t CpuGqa::num_key_tiles(const Call& at, int64_t token) const {
  return at.index.cache_positions[token] / kKeyTile + 1;
}

int64_t CpuGqa::point_at_heads(const Call& at, const TokenTile& tile, int64_t kv_head, Rows& rows) const {
  size_t row = 0;
  for (int64_t t = tile.first; t < tile.first + tile.count; ++t) {
    for (int64_t i = 0; i < shape_.group_size(); ++i, ++row) {
      const int64_t column = (kv_head * shape_.group_size() + i) * shape_.head_dim;
      rows.q[row] = at.q.row<float>(t) + column;
      rows.out[row] = at.out.row<float>(t) + column;
    }
  }
  return static_cast<int64_t>(row);
}

int64_t CpuGqa::attend_keys(const Call& at, const TokenTile& tile, int64_t kv_head, int64_t key_tile,
                            Rows& rows) const {
  const int64_t begin = key_tile * kKeyTile;
  const int32_t* positions = at.index.cache_positions + tile.first;  // [tile.count] rising
  const int64_t seq = at.index.seq_of_token[tile.first];
  const int64_t all_keys = std::min(kKeyTile, positions[tile.count - 1] + 1 - begin);
  const uint16_t* keys[kKeyTile];  // [kKeyTile]
  AttendGqaArgs args;
  args.keys = keys;
  args.value_at = shape_.kv_dim();
  args.first = std::max<int64_t>(at.index.first_position - begin, 0);
  args.head_dim = shape_.head_dim;
  args.scale = shape_.softmax_scale;
  for (int64_t j = args.first; j < all_keys; ++j) {
    keys[j] = at.cache.latents.row<uint16_t>(slot_of(at.index, seq, begin + j)) + kv_head * shape_.head_dim;
  }
  int64_t token = 0;
  while (positions[token] < begin) ++token;
  const int64_t first_token = token;
  // Tokens whose last key lies in this tile come first, each with its own keys; the others see all of it.
  while (token < tile.count) {
    const int64_t num_keys = std::min(kKeyTile, positions[token] + 1 - begin);
    const int64_t num_tokens = num_keys == kKeyTile ? tile.count - token : 1;
    const int64_t row = token * shape_.group_size();
    args.end = num_keys;
    args.num_rows = num_tokens * shape_.group_size();
    args.q = rows.q.data() + row;
    args.out = rows.out.data() + row;
    args.max = rows.max.data() + row;
    args.sum = rows.sum.data() + row;
    kernels_.attend_gqa(args);
    token += num_tokens;
  }
  return first_token * shape_.group_size();
}

void CpuGqa::attend_in_order(const Call& at) {
  const int64_t dim = shape_.head_dim;
  const int64_t num_heads = shape_.num_kv_heads;
  pool_.parallel_for(static_cast<int64_t>(tiles_.size()) * num_heads, [&](int64_t task, int worker_id) {
    Worker& worker = workers_[static_cast<size_t>(worker_id)];
    Rows& total = worker.total;
    Rows& part = worker.part;
    const TokenTile& tile = tiles_[static_cast<size_t>(task / num_heads)];
    const int64_t kv_head = task % num_heads;
    const int64_t num_rows = point_at_heads(at, tile, kv_head, total);
    part.q = total.q;
    for (int64_t row = 0; row < num_rows; ++row) {
      part.out[static_cast<size_t>(row)] = worker.part_data.data() + row * dim;
    }
    attend_keys(at, tile, kv_head, 0, total);
    for (int64_t key_tile = 1; key_tile < num_key_tiles(at, tile.first + tile.count - 1); ++key_tile) {
      auto row = static_cast<size_t>(attend_keys(at, tile, kv_head, key_tile, part));
      for (; row < static_cast<size_t>(num_rows); ++row) {
        kernels_.combine(total.out[row], &total.max[row], &total.sum[row], part.out[row], part.max[row],
                         part.sum[row], dim);
      }
    }
    for (size_t row = 0; row < static_cast<size_t>(num_rows); ++row) {
      kernels_.scale(total.out[row], 1.0f / total.sum[row], dim, total.out[row]);
    }
  });
}

void CpuGqa::attend_split(const Call& at) {
  const int64_t dim = shape_.head_dim;
  const int64_t num_heads = shape_.num_kv_heads;
  const auto num_tasks = static_cast<int64_t>(tiles_.size()) * num_heads;  // of one tile of keys
  const int64_t num_rows =
      num_tasks * tile_rows_;  // row = task * tile_rows + row of the tile; some stay unused
  const int64_t all_tiles = ceil_div(at.index.max_context_len, kKeyTile);
  const int64_t wave_tiles = max_parts_ / num_rows;  // at least 1, see the constructor
  for (int64_t first = 0; first < all_tiles; first += wave_tiles) {
    const int64_t num_tiles = std::min(wave_tiles, all_tiles - first);
    // Part (key tile, row) of the wave.
    pool_.parallel_for(num_tasks * num_tiles, [&](int64_t item, int worker_id) {
      const int64_t key_tile = first + item / num_tasks;
      const int64_t task = item % num_tasks;
      const TokenTile& tile = tiles_[static_cast<size_t>(task / num_heads)];
      if (key_tile >= num_key_tiles(at, tile.first + tile.count - 1)) return;
      Rows& rows = workers_[static_cast<size_t>(worker_id)].part;
      const int64_t count = point_at_heads(at, tile, task % num_heads, rows);
      const int64_t part = item * tile_rows_;
      for (int64_t row = 0; row < count; ++row) {
        rows.out[static_cast<size_t>(row)] = parts_.data() + (part + row) * dim;
      }
      const int64_t from = attend_keys(at, tile, task % num_heads, key_tile, rows);
      std::copy(rows.max.begin() + from, rows.max.begin() + count, parts_max_.begin() + part + from);
      std::copy(rows.sum.begin() + from, rows.sum.begin() + count, parts_sum_.begin() + part + from);
    });
    pool_.parallel_for(num_tasks, [&](int64_t task, int worker_id) {
      const TokenTile& tile = tiles_[static_cast<size_t>(task / num_heads)];
      Rows& rows = workers_[static_cast<size_t>(worker_id)].total;
      const int64_t count = point_at_heads(at, tile, task % num_heads, rows);
      for (int64_t row = 0; row < count; ++row) {
        const int64_t end_tile = num_key_tiles(at, tile.first + row / shape_.group_size());
        float* out = rows.out[static_cast<size_t>(row)];
        float* max = total_max_.data() + task * tile_rows_ + row;
        float* sum = total_sum_.data() + task * tile_rows_ + row;
        for (int64_t key_tile = first; key_tile < std::min(end_tile, first + num_tiles); ++key_tile) {
          const auto part = static_cast<size_t>(((key_tile - first) * num_tasks + task) * tile_rows_ + row);
          const float* values = parts_.data() + part * static_cast<size_t>(dim);
          if (key_tile == 0) {
            memcpy(out, values, static_cast<size_t>(dim) * sizeof(float));
            *max = parts_max_[part];
            *sum = parts_sum_[part];
          } else {
            kernels_.combine(out, max, sum, values, parts_max_[part], parts_sum_[part], dim);
          }
        }
        const bool is_done = end_tile > first && end_tile <= first + num_tiles;
        if (is_done) kernels_.scale(out, 1.0f / *sum, dim, out);
      }
    });
  }
}

}  // namespace rodin
