// Grouped-query attention of CpuOps. Keys and values are cached in 16 bits, queries and sums are float32.
// Tiles of kKeyTile keys at absolute positions, each with its own maximum and sum, are combined in rising
// order. They are computed one after another by one task, or spread over the workers and then combined: the
// same operations either way, so that decoding, a prefill chunk and a prefix hit give the same bits.
#pragma once

#include <vector>

#include "ops/cpu/host_ops.h"
#include "ops/cpu/kernels.h"

namespace rodin {

class CpuGqa {
 public:
  // `kernels` and `pool` outlive this; a call has at most max_step_tokens tokens.
  CpuGqa(const Kernels& kernels, ThreadPool& pool, const GqaShape& shape, int64_t max_step_tokens);

  size_t bytes() const;

  // See Ops::gqa_rope_store and Ops::gqa_attention.
  void rope_store(const Tensor& q, const Tensor& kv, const Tensor& rope_table, const StepIndex& index,
                  const CacheLayer& cache);
  void attention(const Tensor& q, const StepIndex& index, const CacheLayer& cache, const Tensor& out);

 private:
  // Consecutive tokens of one sequence. With a kv head they make rows: row = token of the tile * group_size +
  // query head of the group.
  struct TokenTile {
    int64_t first = 0;
    int64_t count = 0;
  };

  // Where the rows of a tile and a kv head come from and go to, [tile_rows_] each.
  struct Rows {
    std::vector<const float*> q;
    std::vector<float*> out;
    std::vector<float> max;
    std::vector<float> sum;
  };

  struct Worker {
    Rows total;
    Rows part;                     // one tile of keys; out lies in part_data
    std::vector<float> part_data;  // [tile_rows_, D]
  };

  struct Call {
    const Tensor& q;
    const StepIndex& index;
    const CacheLayer& cache;
    const Tensor& out;
  };

  int64_t num_key_tiles(const Call& at, int64_t token) const;
  // Points rows.q, and with it rows.out, at the heads of a kv head; returns the number of rows.
  int64_t point_at_heads(const Call& at, const TokenTile& tile, int64_t kv_head, Rows& rows) const;
  // One tile of keys for those rows of a token tile that see any of it: from the returned row on.
  int64_t attend_keys(const Call& at, const TokenTile& tile, int64_t kv_head, int64_t key_tile,
                      Rows& rows) const;
  void attend_in_order(const Call& at);
  void attend_split(const Call& at);

  const Kernels& kernels_;
  ThreadPool& pool_;
  const GqaShape shape_;
  const int64_t tile_tokens_;
  const int64_t tile_rows_;
  std::vector<TokenTile> tiles_;  // of the call at hand
  std::vector<Worker> workers_;   // [num_threads]
  int64_t max_parts_ = 0;         // most rows of one wave of attend_split
  std::vector<float> parts_;      // [max_parts, D]
  std::vector<float> parts_max_;  // [max_parts]
  std::vector<float> parts_sum_;  // [max_parts]
  std::vector<float> total_max_;  // [max_parts]
  std::vector<float> total_sum_;  // [max_parts]
};

}  // namespace rodin
