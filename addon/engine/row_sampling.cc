#include "engine/row_sampling.h"

#include <algorithm>

namespace rodin {

bool has_penalty(const SampleBatch& batch, int64_t seq) {
  const auto s = static_cast<size_t>(seq);
  return batch.presence_penalty[s] != 0 || batch.frequency_penalty[s] != 0 ||
         batch.repetition_penalty[s] != 1;
}

void RowSampling::clear() {
  batch_ = SampleBatch{};
  batch_.history_start.assign(1, 0);
  batch_.bias_start.assign(1, 0);
  batch_.mask_start.assign(1, 0);
}

int32_t RowSampling::append(const SampleBatch& batch, int64_t seq, const int32_t* more, int64_t num_more,
                            bool has_logprobs) {
  const auto s = static_cast<size_t>(seq);
  const auto copy = [s](auto& to, const auto& from) { to.push_back(from[s]); };
  copy(batch_.temperature, batch.temperature);
  copy(batch_.top_p, batch.top_p);
  copy(batch_.top_k, batch.top_k);
  copy(batch_.min_p, batch.min_p);
  copy(batch_.seed_low, batch.seed_low);
  copy(batch_.seed_high, batch.seed_high);
  copy(batch_.presence_penalty, batch.presence_penalty);
  copy(batch_.frequency_penalty, batch.frequency_penalty);
  copy(batch_.repetition_penalty, batch.repetition_penalty);
  batch_.num_logprobs.push_back(has_logprobs ? batch.num_logprobs[s] : -1);

  const auto copy_range = [s](auto& to, const auto& from, const std::vector<int32_t>& starts) {
    to.insert(to.end(), from.begin() + starts[s], from.begin() + starts[s + 1]);
  };
  copy_range(batch_.bias_ids, batch.bias_ids, batch.bias_start);
  copy_range(batch_.bias_values, batch.bias_values, batch.bias_start);
  batch_.bias_start.push_back(static_cast<int32_t>(batch_.bias_ids.size()));
  copy_range(batch_.masks, batch.masks, batch.mask_start);
  batch_.mask_start.push_back(static_cast<int32_t>(batch_.masks.size()));

  const size_t history_begin = batch_.history_ids.size();
  copy_range(batch_.history_ids, batch.history_ids, batch.history_start);
  copy_range(batch_.history_counts, batch.history_counts, batch.history_start);
  if (has_penalty(batch, seq)) {
    for (int64_t i = 0; i < num_more; ++i) count(more[i], history_begin);
  }
  batch_.history_start.push_back(static_cast<int32_t>(batch_.history_ids.size()));
  return static_cast<int32_t>(batch_.temperature.size()) - 1;
}

void RowSampling::count(int32_t id, size_t history_begin) {
  std::vector<int32_t>& ids = batch_.history_ids;
  const auto found = std::find(ids.begin() + static_cast<int64_t>(history_begin), ids.end(), id);
  if (found == ids.end()) {
    ids.push_back(id);
    batch_.history_counts.push_back(1);
  } else {
    batch_.history_counts[static_cast<size_t>(found - ids.begin())] += 1;
  }
}

}  // namespace rodin
