#include "cuda/mla_prefill_plan.h"

#include <algorithm>

namespace rodin::cuda {

void MlaPrefillPlan::fill(const StepIndex& host, int64_t min_tokens, int64_t max_keys) {
  tiles.clear();
  slots.clear();
  is_prefill.assign(static_cast<size_t>(host.num_seqs), 0);
  for (int64_t seq = 0; seq < host.num_seqs; ++seq) {
    const int32_t first_token = host.q_start[seq], end_token = host.q_start[seq + 1];
    if (end_token - first_token < min_tokens) continue;
    const int64_t first_position = host.cache_positions[first_token];
    const int64_t num_keys = host.cache_positions[end_token - 1] + 1 - host.first_position;
    const int64_t padded_keys = (num_keys + kPrefillKeys - 1) / kPrefillKeys * kPrefillKeys;
    if (first_position < host.first_position || static_cast<int64_t>(slots.size()) + padded_keys > max_keys)
      continue;
    is_prefill[static_cast<size_t>(seq)] = 1;
    const auto first_key = static_cast<int32_t>(slots.size());
    for (int32_t token = first_token; token < end_token; token += kPrefillTokens) {
      tiles.push_back({token, std::min(kPrefillTokens, end_token - token), first_key,
                       static_cast<int32_t>(host.cache_positions[token] + 1 - host.first_position)});
    }
    const int32_t* table = host.block_table + host.block_table_start[seq];
    for (int64_t key = 0; key < padded_keys; ++key) {
      const int64_t position = host.first_position + std::min(key, num_keys - 1);
      slots.push_back(static_cast<int32_t>(table[position / host.block_size] * host.block_size +
                                           position % host.block_size));
    }
  }
  // The longest last: blocks start with them.
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const PrefillTile& a, const PrefillTile& b) { return a.num_keys < b.num_keys; });
}

}  // namespace rodin::cuda
