// The index arrays of a StepIndex on the host, kept to be reused.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "engine/step.h"
#include "ops/ops.h"

namespace rodin {

class HostIndex {
 public:
  void clear() {
    for (auto* array : {&token_ids_, &rope_positions_, &cache_positions_, &slots_, &seq_of_token_}) {
      array->clear();
    }
    q_start_.assign(1, 0);
  }

  // Rows are added sequence by sequence; end_sequence() follows the last one of each, also where there is
  // none.
  void add_row(int32_t token_id, int32_t rope_position, int32_t cache_position, int32_t slot) {
    token_ids_.push_back(token_id);
    rope_positions_.push_back(rope_position);
    cache_positions_.push_back(cache_position);
    slots_.push_back(slot);
    seq_of_token_.push_back(static_cast<int32_t>(q_start_.size()) - 1);
  }
  void end_sequence() { q_start_.push_back(static_cast<int32_t>(token_ids_.size())); }

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids_.size()); }

  // A view of the rows so far with the block tables of `batch`, valid until the next clear().
  StepIndex view(const StepBatch& batch, int64_t block_size, int64_t first_position) const {
    StepIndex index;
    index.num_seqs = static_cast<int64_t>(q_start_.size()) - 1;
    index.num_tokens = num_tokens();
    index.block_size = block_size;
    index.first_position = first_position;
    for (size_t s = 1; s < q_start_.size(); ++s) {
      index.max_q_len = std::max<int64_t>(index.max_q_len, q_start_[s] - q_start_[s - 1]);
    }
    for (const int32_t position : cache_positions_) {
      index.max_context_len = std::max<int64_t>(index.max_context_len, position + 1);
    }
    index.token_ids = token_ids_.data();
    index.rope_positions = rope_positions_.data();
    index.cache_positions = cache_positions_.data();
    index.slots = slots_.data();
    index.q_start = q_start_.data();
    index.seq_of_token = seq_of_token_.data();
    index.block_table_start = batch.block_table_start.data();
    index.block_table = batch.block_table.data();
    return index;
  }

 private:
  std::vector<int32_t> token_ids_;        // [T]
  std::vector<int32_t> rope_positions_;   // [T]
  std::vector<int32_t> cache_positions_;  // [T]
  std::vector<int32_t> slots_;            // [T]
  std::vector<int32_t> q_start_;          // [S + 1]
  std::vector<int32_t> seq_of_token_;     // [T]
};

}  // namespace rodin
