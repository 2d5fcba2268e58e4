// Sampling: the rows' settings go to the device in one copy, tokens and log-probabilities come back in one.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"

namespace rodin::cuda {

void CudaOps::reserve_sample() {
  const int64_t rows = limits_.max_logit_rows;
  const int64_t num_chunks = (limits_.vocab_size + kSampleChunk - 1) / kSampleChunk;
  adjusted_ = workspace<float>(rows * limits_.vocab_size);
  sample_chunks_ = workspace<SampleChunk>(rows * num_chunks);
  noise_chunks_ = workspace<SampleNoiseChunk>(rows * num_chunks);
  outcomes_ = workspace<SampleOutcome>(rows);
  top_ids_ = workspace<int32_t>(rows * kSampleMaxTop);
  top_logprobs_ = workspace<float>(rows * kSampleMaxTop);
  host_outcomes_ =
      static_cast<SampleOutcome*>(pinned_alloc(static_cast<size_t>(rows) * sizeof(SampleOutcome)));
  sample_arrays_.begin(static_cast<size_t>(rows) * sizeof(SampleRow) + (size_t{64} << 10));
}

void CudaOps::sample(const SampleArgs& args) {
  const SampleBatch& batch = *args.batch;
  const int64_t num_rows = args.num_rows;
  check(num_rows <= limits_.max_logit_rows && args.vocab_size <= limits_.vocab_size, "sample() of ", num_rows,
        " rows of ", args.vocab_size, " logits is larger than reserved");
  SampleResult& result = *args.result;
  const auto count = static_cast<size_t>(num_rows);
  result.sampled_ids.assign(count, -1);
  result.sampled_logprobs.assign(count, 0);
  result.non_finite.assign(count, 1);
  result.top_start.assign(count + 1, 0);

  std::vector<SampleRow> rows(count);          // [R]
  std::vector<int32_t> device_tops(count, 0);  // [R] where a row's likeliest tokens begin on the device
  int32_t num_device_top = 0;
  bool has_adjusted = false;
  for (size_t r = 0; r < count; ++r) {
    const auto s = static_cast<size_t>(args.row_seq[r]);
    SampleRow& row = rows[r];
    row.temperature = batch.temperature[s];
    row.lowest_score = batch.min_p[s] > 0 ? static_cast<float>(std::log(static_cast<double>(batch.min_p[s])))
                                          : std::numeric_limits<float>::lowest();
    row.top_k = batch.top_k[s];
    row.top_p = batch.top_p[s];
    row.seed_low = batch.seed_low[s];
    row.seed_high = batch.seed_high[s];
    row.position = args.row_position[r];
    row.num_top = static_cast<int32_t>(
        std::min<int64_t>(batch.num_logprobs[s], args.vocab_size));  // -1 stays: no log-probabilities
    row.bias_begin = batch.bias_start[s];
    row.bias_end = batch.bias_start[s + 1];
    row.history_begin = batch.history_start[s];
    row.history_end = batch.history_start[s + 1];
    row.mask_begin = batch.mask_start[s];
    row.mask_end = batch.mask_start[s + 1];
    row.repetition = batch.repetition_penalty[s];
    row.frequency = batch.frequency_penalty[s];
    row.presence = batch.presence_penalty[s];
    has_adjusted = has_adjusted || row.is_adjusted();
    device_tops[r] = row.top_start = num_device_top;
    if (row.num_top > 0 && row.num_top <= kSampleMaxTop) num_device_top += row.num_top;
    result.top_start[r + 1] = result.top_start[r] + std::max(row.num_top, 0);
  }
  const auto num_top = static_cast<size_t>(result.top_start[count]);
  result.top_ids.assign(num_top, -1);
  result.top_logprobs.assign(num_top, 0);
  if (num_rows == 0) return;

  const auto bytes_of = [](const auto& vector) { return vector.size() * sizeof(vector[0]) + 16; };
  sample_arrays_.begin(bytes_of(rows) + bytes_of(batch.bias_ids) + bytes_of(batch.bias_values) +
                       bytes_of(batch.history_ids) + bytes_of(batch.history_counts) + bytes_of(batch.masks));
  const auto add = [this](const auto& vector) {
    return sample_arrays_.add(vector.data(), static_cast<int64_t>(vector.size()));
  };
  SampleParams params;
  params.logits = args.logits;
  params.adjusted = adjusted_;
  params.rows = add(rows);
  params.bias_ids = add(batch.bias_ids);
  params.bias_values = add(batch.bias_values);
  params.history_ids = add(batch.history_ids);
  params.history_counts = add(batch.history_counts);
  params.masks = add(batch.masks);
  params.chunks = sample_chunks_;
  params.noise_chunks = noise_chunks_;
  params.results = outcomes_;
  params.top_ids = top_ids_;
  params.top_logprobs = top_logprobs_;
  params.num_rows = static_cast<int32_t>(num_rows);
  params.vocab_size = static_cast<int32_t>(args.vocab_size);
  params.num_chunks = static_cast<int32_t>((args.vocab_size + kSampleChunk - 1) / kSampleChunk);
  params.has_adjusted = has_adjusted;
  sample_arrays_.flush(stream_);
  run_sample(params, stream_);

  RODIN_CUDA(cudaMemcpyAsync(host_outcomes_, outcomes_, count * sizeof(SampleOutcome), cudaMemcpyDeviceToHost,
                             stream_));
  std::vector<int32_t> ids(static_cast<size_t>(num_device_top));     // [num_device_top]
  std::vector<float> logprobs(static_cast<size_t>(num_device_top));  // [num_device_top]
  if (num_device_top > 0) {
    RODIN_CUDA(
        cudaMemcpyAsync(ids.data(), top_ids_, ids.size() * sizeof(int32_t), cudaMemcpyDeviceToHost, stream_));
    RODIN_CUDA(cudaMemcpyAsync(logprobs.data(), top_logprobs_, logprobs.size() * sizeof(float),
                               cudaMemcpyDeviceToHost, stream_));
  }
  RODIN_CUDA(cudaStreamSynchronize(stream_));

  for (size_t r = 0; r < count; ++r) {
    const SampleOutcome& outcome = host_outcomes_[r];
    result.sampled_ids[r] = outcome.id;
    result.non_finite[r] = outcome.id < 0;
    if (outcome.id < 0 || rows[r].num_top < 0) continue;
    result.sampled_logprobs[r] = outcome.logprob;
    if (rows[r].num_top > kSampleMaxTop) {
      select_on_host(args, static_cast<int64_t>(r), outcome.lse);
      continue;
    }
    std::copy_n(ids.begin() + device_tops[r], rows[r].num_top, result.top_ids.begin() + result.top_start[r]);
    std::copy_n(logprobs.begin() + device_tops[r], rows[r].num_top,
                result.top_logprobs.begin() + result.top_start[r]);
  }
}

void CudaOps::select_on_host(const SampleArgs& args, int64_t row, double lse) {
  SampleResult& result = *args.result;
  std::vector<float> logits(static_cast<size_t>(args.vocab_size));  // [V]
  download(logits.data(), args.logits + row * args.vocab_size, logits.size() * sizeof(float));
  std::vector<int32_t> ids(logits.size());  // [V]
  std::iota(ids.begin(), ids.end(), 0);
  const int32_t first = result.top_start[static_cast<size_t>(row)];
  const int32_t count = result.top_start[static_cast<size_t>(row) + 1] - first;
  std::partial_sort(ids.begin(), ids.begin() + count, ids.end(), [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
  for (int32_t i = 0; i < count; ++i) {
    const auto at = static_cast<size_t>(first + i);
    const int32_t id = ids[static_cast<size_t>(i)];
    result.top_ids[at] = id;
    result.top_logprobs[at] = static_cast<float>(static_cast<double>(logits[static_cast<size_t>(id)]) - lse);
  }
}

}  // namespace rodin::cuda
