#include "ops/cpu/cpu_expanded_mla.h"

#include <algorithm>

namespace rodin {
namespace {

// Tiles of keys of one wave of attend_split.
constexpr int64_t kMaxParts = 256;
// Multiply-adds below which attention is not worth waking the other workers.
constexpr int64_t kMinParallelWork = 128 * 1024;
// Tokens that a task stores.
constexpr int64_t kStoredTokens = 16;
constexpr int64_t kRowAlign = 32;

// Tiles of keys of a token.
int64_t num_tiles_of(const StepIndex& index, int64_t token) {
  return index.cache_positions[token] / kKeyTile + 1;
}

}  // namespace

CpuExpandedMla::CpuExpandedMla(const Kernels& kernels, ThreadPool& pool, const MlaShape& shape,
                               int64_t block_size, int64_t max_step_tokens)
    : kernels_(kernels),
      pool_(pool),
      shape_(shape),
      layout_(expanded_layout(shape)),
      is_grouped_(block_size % kKeyGroup == 0),
      workers_(static_cast<size_t>(pool.num_threads())),
      products_(static_cast<size_t>(max_step_tokens * shape.num_heads * (shape.nope_dim + shape.v_dim))) {
  const auto heads = static_cast<size_t>(shape.num_heads);
  for (Worker& worker : workers_) {
    const int64_t query = round_up(shape.nope_dim, kRowAlign) + round_up(shape.rope_dim, kRowAlign);
    worker.scratch.resize(static_cast<size_t>(kQueryTile * query));
    worker.query.resize(static_cast<size_t>(shape.num_heads * shape.qk_dim()));
    worker.row.resize(static_cast<size_t>(layout_.row_dim()));
    if (!is_grouped_) worker.groups.resize(static_cast<size_t>(kKeyTile * layout_.row_dim()));
    worker.part.resize(static_cast<size_t>(out_dim()));
    for (auto* values : {&worker.part_max, &worker.part_sum, &worker.max, &worker.sum}) values->resize(heads);
  }
  parts_.resize(static_cast<size_t>(kMaxParts * out_dim()));
  for (auto* values : {&parts_max_, &parts_sum_, &total_max_, &total_sum_}) {
    values->resize(static_cast<size_t>(kMaxParts) * heads);
  }
}

size_t CpuExpandedMla::bytes() const {
  const Worker& worker = workers_[0];
  const size_t worker_bytes =
      (worker.scratch.size() + worker.row.size() + worker.groups.size()) * sizeof(uint16_t) +
      (worker.query.size() + worker.part.size() + 4 * worker.max.size()) * sizeof(float);
  return workers_.size() * worker_bytes +
         (products_.size() + parts_.size() + 4 * parts_max_.size()) * sizeof(float);
}

Tensor CpuExpandedMla::products(int64_t num_tokens) {
  const int64_t cols = shape_.num_heads * (shape_.nope_dim + shape_.v_dim);
  return {products_.data(), Dtype::kF32, num_tokens, cols, cols};
}

void CpuExpandedMla::store(const Tensor& kv, const Tensor& rope_table, const StepIndex& index,
                           const CacheLayer& cache) {
  const Tensor expanded = products(index.num_tokens);
  pool_.parallel_for(ceil_div(index.num_tokens, kStoredTokens), [&](int64_t task, int worker) {
    const int64_t end = std::min(index.num_tokens, (task + 1) * kStoredTokens);
    for (int64_t t = task * kStoredTokens; t < end; ++t) {
      if (index.slots[t] < 0) continue;
      float* key = kv.row<float>(t) + shape_.lora_rank;
      apply_rope(key, rope_table.row<float>(t), shape_.rope_dim, shape_.rope_interleave);
      const int64_t slot = index.slots[t];
      uint16_t* row =
          is_grouped_ ? workers_[static_cast<size_t>(worker)].row.data() : cache.latents.row<uint16_t>(slot);
      uint16_t* values = row + layout_.value_at() / kKeyGroup;
      for (int64_t h = 0; h < shape_.num_heads; ++h) {
        const float* product = expanded.row<float>(t) + h * (shape_.nope_dim + shape_.v_dim);
        uint16_t* nope = row + h * layout_.nope_room();
        kernels_.to_cache(product, shape_.nope_dim, nope);
        if (layout_.nope_room() > shape_.nope_dim) nope[shape_.nope_dim] = 0;
        kernels_.to_cache(product + shape_.nope_dim, shape_.v_dim, values + h * shape_.v_dim);
      }
      kernels_.to_cache(key, shape_.rope_dim, values - shape_.rope_dim);
      if (!is_grouped_) continue;
      GroupKeyArgs args;
      args.layout = layout_;
      args.row = row;
      args.lane = slot % kKeyGroup;
      args.group = cache.latents.row<uint16_t>(slot - args.lane);
      kernels_.group_key(args);
    }
  });
}

CpuExpandedMla::Tile CpuExpandedMla::tile_of(const Call& at, int64_t token, int64_t tile) const {
  const StepIndex& index = at.index;
  const int64_t begin = tile * kKeyTile;
  Tile result;
  result.begin = begin;
  result.first = std::max<int64_t>(index.first_position - begin, 0);
  result.end = std::min<int64_t>(kKeyTile, index.cache_positions[token] + 1 - begin);
  if (!is_grouped_) return result;
  const int64_t first_group = result.first / kKeyGroup;
  const int64_t last_group = (result.end - 1) / kKeyGroup;
  for (int64_t i = 0; i < kTileGroups; ++i) {
    const int64_t group = std::clamp(i, first_group, last_group);
    const int64_t slot = slot_of(index, index.seq_of_token[token], begin + group * kKeyGroup);
    result.groups[i] = at.cache.latents.row<uint16_t>(slot);
  }
  return result;
}

void CpuExpandedMla::make_groups(const Call& at, int64_t token, Tile& tile, Worker& worker) const {
  GroupKeyArgs args;
  args.layout = layout_;
  const int64_t group_size = kKeyGroup * layout_.row_dim();
  for (int64_t j = tile.first; j < tile.end; ++j) {
    const int64_t slot = slot_of(at.index, at.index.seq_of_token[token], tile.begin + j);
    args.row = at.cache.latents.row<uint16_t>(slot);
    args.lane = j % kKeyGroup;
    args.group = worker.groups.data() + j / kKeyGroup * group_size;
    kernels_.group_key(args);
  }
  for (int64_t i = 0; i < kTileGroups; ++i) tile.groups[i] = worker.groups.data() + i * group_size;
}

void CpuExpandedMla::take_query(const Call& at, int64_t token, Worker& worker) const {
  kernels_.scale(at.q.row<float>(token), shape_.softmax_scale, shape_.num_heads * shape_.qk_dim(),
                 worker.query.data());
}

void CpuExpandedMla::attend_tile(const Call& at, int64_t token, const Tile& tile, const Tile* next,
                                 Worker& worker, float* out, float* max, float* sum) const {
  AttendExpandedArgs args;
  args.layout = layout_;
  args.q = worker.query.data();
  Tile grouped = tile;
  if (!is_grouped_) make_groups(at, token, grouped, worker);
  args.groups = grouped.groups;
  args.first = tile.first;
  args.end = tile.end;
  args.next_groups = next && is_grouped_ ? next->groups : nullptr;
  args.scratch = worker.scratch.data();
  args.out = out;
  args.max = max;
  args.sum = sum;
  kernels_.attend_expanded(args);
}

void CpuExpandedMla::combine(float* out, float* max, float* sum, const float* part, const float* part_max,
                             const float* part_sum) const {
  for (int64_t h = 0; h < shape_.num_heads; ++h) {
    kernels_.combine(out + h * shape_.v_dim, max + h, sum + h, part + h * shape_.v_dim, part_max[h],
                     part_sum[h], shape_.v_dim);
  }
}

void CpuExpandedMla::divide(float* out, const float* sum) const {
  for (int64_t h = 0; h < shape_.num_heads; ++h) {
    float* head = out + h * shape_.v_dim;
    kernels_.scale(head, 1.0f / sum[h], shape_.v_dim, head);
  }
}

void CpuExpandedMla::attend_token(const Call& at, int64_t token, int64_t next_token, Worker& worker) const {
  float* out = at.out.row<float>(token);
  take_query(at, token, worker);
  Tile tiles[2];  // [2] the one in hand, the one after it
  tiles[0] = tile_of(at, token, 0);
  const int64_t num_tiles = num_tiles_of(at.index, token);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const Tile& keys = tiles[tile % 2];
    Tile& next = tiles[(tile + 1) % 2];
    const bool is_end = tile + 1 == num_tiles;
    const bool is_last = is_end && next_token >= at.index.num_tokens;
    if (!is_end) next = tile_of(at, token, tile + 1);
    if (is_end && !is_last) next = tile_of(at, next_token, 0);
    const Tile* ahead = is_last ? nullptr : &next;
    if (tile == 0) {
      attend_tile(at, token, keys, ahead, worker, out, worker.max.data(), worker.sum.data());
      continue;
    }
    attend_tile(at, token, keys, ahead, worker, worker.part.data(), worker.part_max.data(),
                worker.part_sum.data());
    combine(out, worker.max.data(), worker.sum.data(), worker.part.data(), worker.part_max.data(),
            worker.part_sum.data());
  }
  divide(out, worker.sum.data());
}

void CpuExpandedMla::attention(const Tensor& q, const StepIndex& index, const CacheLayer& cache,
                               const Tensor& out) {
  const Call at = {q, index, cache, out};
  int64_t num_keys = 0;  // of all tokens
  for (int64_t t = 0; t < index.num_tokens; ++t) num_keys += index.cache_positions[t] + 1;
  const int64_t work = num_keys * shape_.num_heads * (shape_.qk_dim() + shape_.v_dim);
  const int64_t num_threads = pool_.num_threads();
  if (num_threads == 1 || work < kMinParallelWork) {
    for (int64_t t = 0; t < index.num_tokens; ++t) attend_token(at, t, t + 1, workers_[0]);
  } else if (index.num_tokens >= 2 * num_threads || index.max_context_len <= kKeyTile) {
    pool_.parallel_for(index.num_tokens, [&](int64_t token, int worker) {
      attend_token(at, token, token + num_threads, workers_[static_cast<size_t>(worker)]);
    });
  } else {
    attend_split(at);
  }
}

// Waves of tiles of keys, all tokens of a call: part = tile of the wave * num_tokens + token.
void CpuExpandedMla::attend_split(const Call& at) {
  const int64_t num_tokens = at.index.num_tokens;
  const int64_t heads = shape_.num_heads;
  const int64_t all_tiles = ceil_div(at.index.max_context_len, kKeyTile);
  const int64_t wave_tiles = std::max<int64_t>(1, kMaxParts / num_tokens);
  const auto part_of = [&](int64_t part) { return parts_.data() + part * out_dim(); };
  for (int64_t first = 0; first < all_tiles; first += wave_tiles) {
    const int64_t num_tiles = std::min(wave_tiles, all_tiles - first);
    pool_.parallel_for(num_tokens * num_tiles, [&](int64_t part, int worker_id) {
      Worker& worker = workers_[static_cast<size_t>(worker_id)];
      const int64_t token = part % num_tokens;
      const int64_t tile = first + part / num_tokens;
      if (tile >= num_tiles_of(at.index, token)) return;
      take_query(at, token, worker);
      attend_tile(at, token, tile_of(at, token, tile), nullptr, worker, part_of(part),
                  parts_max_.data() + part * heads, parts_sum_.data() + part * heads);
    });
    for (int64_t token = 0; token < num_tokens; ++token) {
      float* out = at.out.row<float>(token);
      float* max = total_max_.data() + token * heads;
      float* sum = total_sum_.data() + token * heads;
      const int64_t end_tile = num_tiles_of(at.index, token);
      for (int64_t tile = first; tile < std::min(end_tile, first + num_tiles); ++tile) {
        const int64_t part = (tile - first) * num_tokens + token;
        const float* part_max = parts_max_.data() + part * heads;
        const float* part_sum = parts_sum_.data() + part * heads;
        if (tile == 0) {
          std::copy_n(part_of(part), out_dim(), out);
          std::copy_n(part_max, heads, max);
          std::copy_n(part_sum, heads, sum);
        } else {
          combine(out, max, sum, part_of(part), part_max, part_sum);
        }
      }
      if (end_tile > first && end_tile <= first + num_tiles) divide(out, sum);
    }
  }
}

}  // namespace rodin
