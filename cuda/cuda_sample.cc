// Sampling: the rows' settings go to the device in one copy; tokens and log-probabilities come back into
// pinned memory, behind which an event says that they are there.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

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
  const auto pinned = [](auto*& data, int64_t count) {
    data = static_cast<std::remove_reference_t<decltype(data)>>(
        pinned_alloc(static_cast<size_t>(count) * sizeof(*data)));
  };
  for (SampleSlot& slot : sample_slots_) {
    pinned(slot.outcomes, rows);
    pinned(slot.top_ids, rows * kSampleMaxTop);
    pinned(slot.top_logprobs, rows * kSampleMaxTop);
    RODIN_CUDA(cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming));
    slot.arrays.begin(static_cast<size_t>(rows) * sizeof(SampleRow) + (size_t{64} << 10));
  }
  prepare_sample_select(static_cast<int32_t>(limits_.vocab_size));
  for (cudaEvent_t& event : marks_) {
    RODIN_CUDA(cudaEventCreate(&event));
    RODIN_CUDA(cudaEventRecord(event, stream_));
  }
}

void CudaOps::release_sample() {
  for (const SampleSlot& slot : sample_slots_) {
    if (slot.done) cudaEventDestroy(slot.done);
    for (void* data : {static_cast<void*>(slot.outcomes), static_cast<void*>(slot.top_ids),
                       static_cast<void*>(slot.top_logprobs)}) {
      if (data) cudaFreeHost(data);
    }
  }
  for (const cudaEvent_t event : marks_) {
    if (event) cudaEventDestroy(event);
  }
}

void CudaOps::mark(int mark) { RODIN_CUDA(cudaEventRecord(marks_[mark], stream_)); }

double CudaOps::micros_between(int first, int last) {
  float millis = 0;
  RODIN_CUDA(cudaEventSynchronize(marks_[last]));
  RODIN_CUDA(cudaEventElapsedTime(&millis, marks_[first], marks_[last]));
  return static_cast<double>(millis) * 1000;
}

void CudaOps::sample(const SampleArgs& args) {
  SampleSlot& slot = sample_slots_[2];
  enqueue_sample(args, slot);
  collect_sample(slot, *args.result);
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const SampleRow& row = slot.rows[static_cast<size_t>(r)];
    const SampleOutcome& outcome = slot.outcomes[r];
    if (row.num_top > kSampleMaxTop && outcome.id >= 0) select_on_host(args, r, outcome.lse);
  }
}

bool CudaOps::begin_sample(const SampleArgs& args, int slot) {
  for (int64_t r = 0; r < args.num_rows; ++r) {
    if (args.batch->num_logprobs[static_cast<size_t>(args.row_seq[r])] > kSampleMaxTop) return false;
  }
  enqueue_sample(args, sample_slots_[slot]);
  return true;
}

bool CudaOps::is_sampled(int slot) {
  const cudaError_t error = cudaEventQuery(sample_slots_[slot].done);
  if (error != cudaErrorNotReady) return true;  // an error shows in finish_sample()
  cudaGetLastError();
  return false;
}

void CudaOps::finish_sample(int slot, SampleResult& result) { collect_sample(sample_slots_[slot], result); }

void CudaOps::enqueue_sample(const SampleArgs& args, SampleSlot& slot) {
  const SampleBatch& batch = *args.batch;
  const int64_t num_rows = args.num_rows;
  check(num_rows <= limits_.max_logit_rows && args.vocab_size <= limits_.vocab_size, "sample() of ", num_rows,
        " rows of ", args.vocab_size, " logits is larger than reserved");
  slot.rows.resize(static_cast<size_t>(num_rows));
  int32_t num_device_top = 0;
  SampleParams params;
  for (int64_t r = 0; r < num_rows; ++r) {
    const auto s = static_cast<size_t>(args.row_seq[r]);
    SampleRow& row = slot.rows[static_cast<size_t>(r)];
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
    params.has_adjusted = params.has_adjusted || row.is_adjusted();
    params.has_noise = params.has_noise || row.needs_noise() || row.num_top >= 0;
    params.has_selection = params.has_selection || row.needs_selection() || row.has_device_top();
    row.top_start = num_device_top;
    if (row.has_device_top()) num_device_top += row.num_top;
  }
  if (num_rows == 0) return;

  const auto bytes_of = [](const auto& vector) { return vector.size() * sizeof(vector[0]) + 16; };
  slot.arrays.begin(bytes_of(slot.rows) + bytes_of(batch.bias_ids) + bytes_of(batch.bias_values) +
                    bytes_of(batch.history_ids) + bytes_of(batch.history_counts) + bytes_of(batch.masks));
  const auto add = [&slot](const auto& vector) {
    return slot.arrays.add(vector.data(), static_cast<int64_t>(vector.size()));
  };
  params.logits = args.logits;
  params.adjusted = adjusted_;
  params.rows = add(slot.rows);
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
  slot.arrays.flush(stream_);
  run_sample(params, stream_);

  const auto fetch = [this](auto* host, const auto* device, int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(*host);
    if (bytes != 0) RODIN_CUDA(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_));
  };
  fetch(slot.outcomes, outcomes_, num_rows);
  fetch(slot.top_ids, top_ids_, num_device_top);
  fetch(slot.top_logprobs, top_logprobs_, num_device_top);
  RODIN_CUDA(cudaEventRecord(slot.done, stream_));
}

void CudaOps::collect_sample(SampleSlot& slot, SampleResult& result) {
  const size_t count = slot.rows.size();
  result.sampled_ids.assign(count, -1);
  result.sampled_logprobs.assign(count, 0);
  result.non_finite.assign(count, 1);
  result.top_start.assign(count + 1, 0);
  for (size_t r = 0; r < count; ++r) {
    result.top_start[r + 1] = result.top_start[r] + std::max(slot.rows[r].num_top, 0);
  }
  result.top_ids.assign(static_cast<size_t>(result.top_start[count]), -1);
  result.top_logprobs.assign(static_cast<size_t>(result.top_start[count]), 0);
  if (count == 0) return;
  RODIN_CUDA(cudaEventSynchronize(slot.done));
  for (size_t r = 0; r < count; ++r) {
    const SampleOutcome& outcome = slot.outcomes[r];
    const SampleRow& row = slot.rows[r];
    result.sampled_ids[r] = outcome.id;
    result.non_finite[r] = outcome.id < 0;
    if (outcome.id < 0 || row.num_top < 0) continue;
    result.sampled_logprobs[r] = outcome.logprob;
    if (!row.has_device_top()) continue;
    std::copy_n(slot.top_ids + row.top_start, row.num_top, result.top_ids.begin() + result.top_start[r]);
    std::copy_n(slot.top_logprobs + row.top_start, row.num_top,
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
