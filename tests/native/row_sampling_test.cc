#include "engine/row_sampling.h"

#include <vector>

#include "tests/native/test.h"

namespace rodin {
namespace {

// Sequence 0 has no penalty; sequence 1 has, a bias, and tokens 7 and 9 in its history.
SampleBatch make_batch() {
  SampleBatch batch;
  batch.temperature = {0, 0.5f};
  batch.top_p = {1, 0.9f};
  batch.top_k = {0, 5};
  batch.min_p = {0, 0.1f};
  batch.seed_low = {1, 2};
  batch.seed_high = {3, 4};
  batch.presence_penalty = {0, 0};
  batch.frequency_penalty = {0, 0.25f};
  batch.repetition_penalty = {1, 1};
  batch.num_logprobs = {2, 3};
  batch.history_start = {0, 0, 2};
  batch.history_ids = {7, 9};
  batch.history_counts = {0, 2};
  batch.bias_start = {0, 0, 1};
  batch.bias_ids = {4};
  batch.bias_values = {-1};
  batch.mask_start = {0, 0, 1};
  batch.masks = {0x0f};
  return batch;
}

TEST("row sampling: a row's history is that of its sequence and the tokens before it") {
  const SampleBatch batch = make_batch();
  const std::vector<int32_t> more = {9, 5, 7, 5};  // [num_more]
  RowSampling rows;
  CHECK(rows.append(batch, 1, more.data(), 0, true) == 0);
  CHECK(rows.append(batch, 1, more.data(), 4, false) == 1);
  CHECK(rows.append(batch, 0, more.data(), 4, true) == 2);
  const SampleBatch& made = rows.batch();
  CHECK(made.history_start == (std::vector<int32_t>{0, 2, 5, 5}));
  CHECK(made.history_ids == (std::vector<int32_t>{7, 9, 7, 9, 5}));
  CHECK(made.history_counts == (std::vector<int32_t>{0, 2, 1, 3, 2}));
  CHECK(made.bias_start == (std::vector<int32_t>{0, 1, 2, 2}));
  CHECK(made.bias_ids == (std::vector<int32_t>{4, 4}));
  CHECK(made.bias_values == (std::vector<float>{-1, -1}));
  CHECK(made.mask_start == (std::vector<int32_t>{0, 1, 2, 2}));
  CHECK(made.masks == (std::vector<int32_t>{0x0f, 0x0f}));
  CHECK(made.num_logprobs == (std::vector<int32_t>{3, -1, 2}));
  CHECK(made.temperature == (std::vector<float>{0.5f, 0.5f, 0}));
  CHECK(made.seed_high == (std::vector<uint32_t>{4, 4, 3}));
  CHECK(made.frequency_penalty == (std::vector<float>{0.25f, 0.25f, 0}));
}

TEST("row sampling: cleared rows leave nothing behind") {
  RowSampling rows;
  const int32_t more = 5;
  rows.append(make_batch(), 1, &more, 1, true);
  rows.clear();
  CHECK(rows.append(make_batch(), 0, &more, 1, true) == 0);
  CHECK(rows.batch().history_ids.empty());
  CHECK(rows.batch().bias_start == (std::vector<int32_t>{0, 0}));
}

}  // namespace
}  // namespace rodin
