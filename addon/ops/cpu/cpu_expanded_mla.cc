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
    worker.query.resize(static_cast<size_t>(2 * shape.num_heads * shape.qk_dim()));
    worker.row.resize(static_cast<size_t>(layout_.row_dim()));
    if (!is_grouped_) worker.groups.resize(static_cast<size_t>(kKeyTile * layout_.row_dim()));
    worker.part.resize(static_cast<size_t>(2 * out_dim()));
    for (auto* values : {&worker.part_max, &worker.part_sum, &worker.max, &worker.sum})
      values->resize(2 * heads);
  }
  units_.reserve(static_cast<size_t>(max_step_tokens));
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

CpuExpandedMla::Result CpuExpandedMla::result_at(std::vector<float>& out, std::vector<float>& max,
                                                 std::vector<float>& sum, int64_t i) const {
  return {out.data() + i * out_dim(), max.data() + i * shape_.num_heads, sum.data() + i * shape_.num_heads};
}

void CpuExpandedMla::find_units(const StepIndex& index) {
  units_.clear();
  for (int64_t t = 0; t < index.num_tokens;) {
    const bool has_two = kernels_.attend_expanded_two != nullptr && t + 1 < index.num_tokens &&
                         index.seq_of_token[t] == index.seq_of_token[t + 1];
    units_.push_back({t, has_two ? 2 : 1});
    t += units_.back().count;
  }
}

CpuExpandedMla::Tile CpuExpandedMla::tile_of(const Call& at, const Unit& unit, int64_t tile) const {
  const StepIndex& index = at.index;
  const int64_t begin = tile * kKeyTile;
  Tile result;
  result.begin = begin;
  result.first = std::max<int64_t>(index.first_position - begin, 0);
  result.end = std::min<int64_t>(kKeyTile, index.cache_positions[unit.last()] + 1 - begin);
  if (!is_grouped_) return result;
  const int64_t first_group = result.first / kKeyGroup;
  const int64_t last_group = (result.end - 1) / kKeyGroup;
  for (int64_t i = 0; i < kTileGroups; ++i) {
    const int64_t group = std::clamp(i, first_group, last_group);
    const int64_t slot = slot_of(index, index.seq_of_token[unit.token], begin + group * kKeyGroup);
    result.groups[i] = at.cache.latents.row<uint16_t>(slot);
  }
  return result;
}

void CpuExpandedMla::make_groups(const Call& at, const Unit& unit, Tile& tile, Worker& worker) const {
  GroupKeyArgs args;
  args.layout = layout_;
  const int64_t group_size = kKeyGroup * layout_.row_dim();
  for (int64_t j = tile.first; j < tile.end; ++j) {
    const int64_t slot = slot_of(at.index, at.index.seq_of_token[unit.token], tile.begin + j);
    args.row = at.cache.latents.row<uint16_t>(slot);
    args.lane = j % kKeyGroup;
    args.group = worker.groups.data() + j / kKeyGroup * group_size;
    kernels_.group_key(args);
  }
  for (int64_t i = 0; i < kTileGroups; ++i) tile.groups[i] = worker.groups.data() + i * group_size;
}

void CpuExpandedMla::take_queries(const Call& at, const Unit& unit, Worker& worker) const {
  const int64_t size = shape_.num_heads * shape_.qk_dim();
  for (int64_t i = 0; i < unit.count; ++i) {
    kernels_.scale(at.q.row<float>(unit.token + i), shape_.softmax_scale, size,
                   worker.query.data() + i * size);
  }
}

void CpuExpandedMla::attend_tile(const Call& at, const Unit& unit, const Tile& tile, const Tile* next,
                                 Worker& worker, const Result* results) const {
  Tile grouped = tile;
  if (!is_grouped_) make_groups(at, unit, grouped, worker);
  AttendExpandedArgs args[2];  // [2]
  for (int64_t i = 0; i < unit.count; ++i) {
    args[i].layout = layout_;
    args[i].q = worker.query.data() + i * shape_.num_heads * shape_.qk_dim();
    args[i].groups = grouped.groups;
    args[i].first = tile.first;
    args[i].end = std::min<int64_t>(kKeyTile, at.index.cache_positions[unit.token + i] + 1 - tile.begin);
    args[i].next_groups = next && is_grouped_ ? next->groups : nullptr;
    args[i].scratch = worker.scratch.data();
    args[i].out = results[i].out;
    args[i].max = results[i].max;
    args[i].sum = results[i].sum;
  }
  const bool both = unit.count == 2 && args[0].end > tile.first;
  if (both) return kernels_.attend_expanded_two(args[0], args[1]);
  kernels_.attend_expanded(args[unit.count - 1]);
}

void CpuExpandedMla::combine(const Result& total, const Result& part) const {
  for (int64_t h = 0; h < shape_.num_heads; ++h) {
    kernels_.combine(total.out + h * shape_.v_dim, total.max + h, total.sum + h, part.out + h * shape_.v_dim,
                     part.max[h], part.sum[h], shape_.v_dim);
  }
}

void CpuExpandedMla::divide(float* out, const float* sum) const {
  for (int64_t h = 0; h < shape_.num_heads; ++h) {
    float* head = out + h * shape_.v_dim;
    kernels_.scale(head, 1.0f / sum[h], shape_.v_dim, head);
  }
}

void CpuExpandedMla::attend_unit(const Call& at, const Unit& unit, const Unit* next_unit,
                                 Worker& worker) const {
  Result totals[2], parts[2];  // [2]
  for (int64_t i = 0; i < unit.count; ++i) {
    parts[i] = result_at(worker.part, worker.part_max, worker.part_sum, i);
    totals[i] = result_at(worker.part, worker.max, worker.sum, i);
    totals[i].out = at.out.row<float>(unit.token + i);
  }
  take_queries(at, unit, worker);
  Tile tiles[2];  // [2] the one in hand, the one after it
  tiles[0] = tile_of(at, unit, 0);
  const int64_t num_tiles = num_tiles_of(at.index, unit.last());
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const Tile& keys = tiles[tile % 2];
    Tile& next = tiles[(tile + 1) % 2];
    const bool is_end = tile + 1 == num_tiles;
    if (!is_end) next = tile_of(at, unit, tile + 1);
    if (is_end && next_unit) next = tile_of(at, *next_unit, 0);
    const Tile* ahead = is_end && !next_unit ? nullptr : &next;
    attend_tile(at, unit, keys, ahead, worker, tile == 0 ? totals : parts);
    if (tile == 0) continue;
    for (int64_t i = 0; i < unit.count; ++i) {
      if (tile < num_tiles_of(at.index, unit.token + i)) combine(totals[i], parts[i]);
    }
  }
  for (int64_t i = 0; i < unit.count; ++i) divide(totals[i].out, totals[i].sum);
}

void CpuExpandedMla::attention(const Tensor& q, const StepIndex& index, const CacheLayer& cache,
                               const Tensor& out) {
  const Call at = {q, index, cache, out};
  find_units(index);
  int64_t num_keys = 0;  // of all tokens
  for (int64_t t = 0; t < index.num_tokens; ++t) num_keys += index.cache_positions[t] + 1;
  const int64_t work = num_keys * shape_.num_heads * (shape_.qk_dim() + shape_.v_dim);
  const int64_t num_threads = pool_.num_threads();
  const auto num_units = static_cast<int64_t>(units_.size());
  const auto attend = [&](int64_t i, int64_t next, int worker) {
    const Unit* next_unit = next < num_units ? &units_[static_cast<size_t>(next)] : nullptr;
    attend_unit(at, units_[static_cast<size_t>(i)], next_unit, workers_[static_cast<size_t>(worker)]);
  };
  if (num_threads == 1 || work < kMinParallelWork) {
    for (int64_t i = 0; i < num_units; ++i) attend(i, i + 1, 0);
  } else if (num_units >= 2 * num_threads || index.num_tokens > kMaxParts ||
             index.max_context_len <= kKeyTile) {
    pool_.parallel_for(num_units, [&](int64_t i, int worker) { attend(i, i + num_threads, worker); });
  } else {
    attend_split(at);
  }
}

// Waves of tiles of keys, all tokens of a call: part = tile of the wave * num_tokens + token.
void CpuExpandedMla::attend_split(const Call& at) {
  const int64_t num_tokens = at.index.num_tokens;
  const auto num_units = static_cast<int64_t>(units_.size());
  const int64_t all_tiles = ceil_div(at.index.max_context_len, kKeyTile);
  const int64_t wave_tiles = std::max<int64_t>(1, kMaxParts / num_tokens);
  const auto part_of = [&](int64_t part) { return result_at(parts_, parts_max_, parts_sum_, part); };
  for (int64_t first = 0; first < all_tiles; first += wave_tiles) {
    const int64_t num_tiles = std::min(wave_tiles, all_tiles - first);
    pool_.parallel_for(num_units * num_tiles, [&](int64_t task, int worker_id) {
      Worker& worker = workers_[static_cast<size_t>(worker_id)];
      const Unit& unit = units_[static_cast<size_t>(task % num_units)];
      const int64_t tile = first + task / num_units;
      if (tile >= num_tiles_of(at.index, unit.last())) return;
      take_queries(at, unit, worker);
      Result results[2];  // [2]
      for (int64_t i = 0; i < unit.count; ++i) {
        results[i] = part_of((tile - first) * num_tokens + unit.token + i);
      }
      attend_tile(at, unit, tile_of(at, unit, tile), nullptr, worker, results);
    });
    for (int64_t token = 0; token < num_tokens; ++token) {
      Result total = result_at(parts_, total_max_, total_sum_, token);
      total.out = at.out.row<float>(token);
      const int64_t end_tile = num_tiles_of(at.index, token);
      for (int64_t tile = first; tile < std::min(end_tile, first + num_tiles); ++tile) {
        const Result part = part_of((tile - first) * num_tokens + token);
        if (tile == 0) {
          std::copy_n(part.out, out_dim(), total.out);
          std::copy_n(part.max, shape_.num_heads, total.max);
          std::copy_n(part.sum, shape_.num_heads, total.sum);
        } else {
          combine(total, part);
        }
      }
      if (end_tile > first && end_tile <= first + num_tiles) divide(total.out, total.sum);
    }
  }
}

}  // namespace rodin
