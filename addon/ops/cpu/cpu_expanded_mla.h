// Multi-head latent attention of CpuOps over expanded keys and values: kv_b is applied once, when a position
// is stored, and attention is the ordinary one. A query meets nope_dim + rope_dim + v_dim values of a key, in
// the absorbed form 2 lora_rank + rope_dim. The latents of 16 positions that follow one another make room for
// a group of 16 keys and values, which lie there as the path's kernels want them (kernels.h, ExpandedLayout);
// where groups do not fit blocks, a position keeps a row, and groups are made whenever they are needed.
// Tiles of kKeyTile keys at absolute positions are combined in rising order, one after another or spread over
// the workers: the same operations either way. Neighbouring tokens of a sequence go through their tiles two
// by two, so that what both attend to is read once; what each of them gets is the same.
#pragma once

#include <vector>

#include "ops/cpu/host_ops.h"
#include "ops/cpu/kernels.h"

namespace rodin {

inline ExpandedLayout expanded_layout(const MlaShape& shape) {
  return {shape.num_heads, shape.nope_dim, shape.rope_dim, shape.v_dim};
}

// Whether keys and values are cached expanded: where they take no more room than the latents. What kv_b makes
// of a stored position is as many multiply-adds as W_UK and W_UV are for an absorbed query.
inline bool caches_expanded(const MlaShape& shape) {
  return shape.num_heads > 0 && expanded_layout(shape).row_dim() <= shape.latent_dim();
}

class CpuExpandedMla {
 public:
  // `kernels` and `pool` outlive this; a call has at most max_step_tokens tokens, in blocks of block_size.
  CpuExpandedMla(const Kernels& kernels, ThreadPool& pool, const MlaShape& shape, int64_t block_size,
                 int64_t max_step_tokens);

  size_t bytes() const;

  // Where kv_b's products of a step's latents go: [num_tokens, A * (nope_dim + v_dim)].
  Tensor products(int64_t num_tokens);
  // Rotates the keys kv[:, lora_rank:] and writes them and products() to the cache rows slots[i] that are not
  // -1.
  void store(const Tensor& kv, const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache);
  // See Ops::mla_attention.
  void attention(const Tensor& q, const StepIndex& index, const CacheLayer& cache, const Tensor& out);

 private:
  struct Call {
    const Tensor& q;
    const StepIndex& index;
    const CacheLayer& cache;
    const Tensor& out;
  };
  // Tokens that go through their tiles together: `count` of one sequence, 1 or 2.
  struct Unit {
    int64_t token;  // the first
    int64_t count;
    int64_t last() const { return token + count - 1; }
  };
  // A tile at absolute positions; its keys from `first` on are attended to.
  struct Tile {
    int64_t begin;  // position of its first key
    int64_t first;
    int64_t end;                          // of the unit's last token
    const uint16_t* groups[kTileGroups];  // [kTileGroups] one without such keys stands for one with some
  };
  // Where a token's part or total goes.
  struct Result {
    float* out;  // [A, v_dim]
    float* max;  // [A]
    float* sum;  // [A]
  };
  // What a worker needs for one tile of a unit.
  struct Worker {
    std::vector<uint16_t> scratch;  // of the kernels
    std::vector<float> query;       // [2, A, qk_dim] times the softmax scale
    std::vector<uint16_t> row;      // [row_dim]
    std::vector<uint16_t> groups;   // [kKeyTile, row_dim] where blocks do not hold whole groups
    std::vector<float> part;        // [2, A, v_dim]
    std::vector<float> part_max;    // [2, A]
    std::vector<float> part_sum;    // [2, A]
    std::vector<float> max;         // [2, A]
    std::vector<float> sum;         // [2, A]
  };

  int64_t out_dim() const { return shape_.num_heads * shape_.v_dim; }
  Result result_at(std::vector<float>& out, std::vector<float>& max, std::vector<float>& sum,
                   int64_t i) const;
  void find_units(const StepIndex& index);
  Tile tile_of(const Call& at, const Unit& unit, int64_t tile) const;
  void make_groups(const Call& at, const Unit& unit, Tile& tile, Worker& worker) const;
  void take_queries(const Call& at, const Unit& unit, Worker& worker) const;
  // A tile of the queries that the worker has taken, for those of the unit's tokens that have it.
  void attend_tile(const Call& at, const Unit& unit, const Tile& tile, const Tile* next, Worker& worker,
                   const Result* results) const;
  void combine(const Result& total, const Result& part) const;
  void divide(float* out, const float* sum) const;
  // All tiles of a unit, one after another; next_unit is what the worker is likely to take next.
  void attend_unit(const Call& at, const Unit& unit, const Unit* next_unit, Worker& worker) const;
  void attend_split(const Call& at);

  const Kernels& kernels_;
  ThreadPool& pool_;
  const MlaShape shape_;
  const ExpandedLayout layout_;
  const bool is_grouped_;         // in the cache
  std::vector<Worker> workers_;   // [num_threads]
  std::vector<Unit> units_;       // of the call at hand
  std::vector<float> products_;   // [max_step_tokens, A * (nope_dim + v_dim)]
  std::vector<float> parts_;      // [kMaxParts, A, v_dim] tiles of attend_split
  std::vector<float> parts_max_;  // [kMaxParts, A]
  std::vector<float> parts_sum_;  // [kMaxParts, A]
  std::vector<float> total_max_;  // [kMaxParts, A] of attend_split's tokens
  std::vector<float> total_sum_;  // [kMaxParts, A]
};

}  // namespace rodin
