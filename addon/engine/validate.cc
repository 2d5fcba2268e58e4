#include "engine/validate.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "ops/check.h"

namespace rodin {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

template <class T>
void check_size(const char* name, const std::vector<T>& values, int64_t expected) {
  check(static_cast<int64_t>(values.size()) == expected, name, " has ", values.size(), " elements, not ",
        expected);
}

// starts[0] = 0, never falling (each range at least min_length long), ending at `total`.
void check_starts(const char* name, const std::vector<int32_t>& starts, int64_t num_seqs, int64_t min_length,
                  int64_t total) {
  check_size(name, starts, num_seqs + 1);
  check(starts[0] == 0, name, "[0] is ", starts[0], ", not 0");
  for (size_t s = 0; s < static_cast<size_t>(num_seqs); ++s) {
    check(int64_t{starts[s + 1]} - starts[s] >= min_length, name, "[", s + 1, "] is ", starts[s + 1],
          ", less than ", min_length, " after ", name, "[", s, "] = ", starts[s]);
  }
  check(starts.back() == total, name, " ends at ", starts.back(), ", not at ", total);
}

void check_ids(const char* name, const std::vector<int32_t>& ids, int64_t limit, const char* limit_name) {
  for (size_t i = 0; i < ids.size(); ++i) {
    check(ids[i] >= 0 && ids[i] < limit, name, "[", i, "] is ", ids[i], ", outside 0 .. ", limit - 1, " (",
          limit_name, ")");
  }
}

// Ids of the vocabulary, or rows of the step before: of the only token sampled of a sequence without the MTP
// module, which would need it here.
void check_token_ids(const StepBatch& batch, int64_t vocab_size, int64_t num_rows_before) {
  for (size_t s = 0; s < batch.num_sampled.size(); ++s) {
    const auto last = static_cast<size_t>(batch.q_start[s + 1]) - 1;
    for (auto t = static_cast<size_t>(batch.q_start[s]); t <= last; ++t) {
      const int64_t id = batch.token_ids[t];
      const bool may_be_row = t == last && batch.num_sampled[s] == 1 && batch.run_mtp[s] == 0;
      check(id < vocab_size && id >= (may_be_row ? -num_rows_before : 0), "token_ids[", t, "] is ", id,
            ", outside 0 .. ", vocab_size - 1, " (vocab_size)",
            may_be_row ? " and no row of the step before, which had " + std::to_string(num_rows_before) : "");
    }
  }
}

// The MTP module's part of sequence s, whose tokens are checked; adds the slots that it may write.
void check_mtp(const StepBatch& batch, const RunnerOptions& options, size_t s,
               std::vector<int32_t>& written) {
  const int32_t num_drafts = batch.num_drafts[s];
  check(batch.run_mtp[s] <= 1, "run_mtp[", s, "] is ", int{batch.run_mtp[s]}, ", neither 0 nor 1");
  check(num_drafts >= 0 && num_drafts <= kMaxDrafts, "num_drafts[", s, "] is ", num_drafts, ", outside 0 .. ",
        kMaxDrafts);
  check(num_drafts == 0 || (batch.run_mtp[s] == 1 && batch.num_sampled[s] > 0), "num_drafts[", s, "] is ",
        num_drafts, " but the sequence ",
        batch.run_mtp[s] == 1 ? "has no sampled row" : "does not run the MTP module");
  if (batch.run_mtp[s] == 0) return;
  check(options.load_mtp, "run_mtp[", s, "] is 1 but the MTP module was not loaded (loadMtp)");
  const int32_t first = batch.q_start[s], end = batch.q_start[s + 1];
  const int64_t num_provisional = batch.num_sampled[s] == 0 ? 0 : std::max(num_drafts, 1);
  const int64_t last = batch.positions[static_cast<size_t>(end) - 1] + num_provisional;
  const int64_t num_blocks = batch.block_table_start[s + 1] - batch.block_table_start[s];
  check(last < options.spec.max_position_embeddings, "the MTP module's entries of sequence ", s,
        " reach position ", last, ", outside 0 .. ", options.spec.max_position_embeddings - 1,
        " (max_position_embeddings)");
  check(last / options.block_size < num_blocks, "the block table of sequence ", s, " has ", num_blocks,
        " blocks of ", options.block_size, " and does not reach position ", last, " of the MTP module");
  const int32_t* blocks = batch.block_table.data() + batch.block_table_start[s];
  for (int64_t p = batch.positions[static_cast<size_t>(first)] + int64_t{1}; p <= last; ++p) {
    written.push_back(
        static_cast<int32_t>(blocks[p / options.block_size] * options.block_size + p % options.block_size));
  }
}

void check_tokens(const StepBatch& batch, const RunnerOptions& options) {
  const int64_t block_size = options.block_size;
  std::vector<int32_t> written;      // slots
  std::vector<int32_t> mtp_written;  // slots of the MTP module's layer
  written.reserve(batch.slot_mapping.size());
  for (size_t s = 0; s < batch.num_sampled.size(); ++s) {
    const int32_t first = batch.q_start[s], end = batch.q_start[s + 1];
    const int32_t* blocks = batch.block_table.data() + batch.block_table_start[s];
    const int64_t num_blocks = batch.block_table_start[s + 1] - batch.block_table_start[s];
    for (int32_t i = first; i < end; ++i) {
      const auto t = static_cast<size_t>(i);
      const int64_t position = batch.positions[t];
      check(position >= 0 && position < options.spec.max_position_embeddings, "positions[", t, "] is ",
            position, ", outside 0 .. ", options.spec.max_position_embeddings - 1,
            " (max_position_embeddings)");
      check(i == first || position == int64_t{batch.positions[t - 1]} + 1, "positions[", t, "] is ", position,
            " after ", batch.positions[t == 0 ? 0 : t - 1],
            ": the positions of a sequence must be consecutive");
      check(position / block_size < num_blocks, "the block table of sequence ", s, " has ", num_blocks,
            " blocks of ", block_size, " and does not reach position ", position);
      const int64_t slot = batch.slot_mapping[t];
      const int64_t expected = blocks[position / block_size] * block_size + position % block_size;
      check(slot == -1 || slot == expected, "slot_mapping[", t, "] is ", slot, ", neither -1 nor ", expected,
            ", where position ", position, " of sequence ", s, " lies");
      if (slot >= 0) written.push_back(static_cast<int32_t>(slot));
    }
    const int32_t sampled = batch.num_sampled[s];
    check(sampled >= 0 && sampled <= end - first, "num_sampled[", s, "] is ", sampled, ", outside 0 .. ",
          end - first, " (the tokens of the sequence)");
    check_mtp(batch, options, s, mtp_written);
  }
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  check(twice == written.end(), "two tokens of the step write slot ", twice == written.end() ? -1 : *twice);
  std::sort(mtp_written.begin(), mtp_written.end());
  const auto mtp_twice = std::adjacent_find(mtp_written.begin(), mtp_written.end());
  check(mtp_twice == mtp_written.end(), "two tokens of the step write slot ",
        mtp_twice == mtp_written.end() ? -1 : *mtp_twice, " of the MTP module");
}

void check_sampling(const StepBatch& batch, int64_t vocab_size) {
  int64_t num_top = 0;
  for (size_t s = 0; s < batch.num_sampled.size(); ++s) {
    const float temperature = batch.temperature[s];
    check(std::isfinite(temperature) && temperature >= 0, "temperature[", s, "] is ", temperature,
          ", which is not a number of at least 0");
    check(batch.top_p[s] > 0 && batch.top_p[s] <= 1, "top_p[", s, "] is ", batch.top_p[s],
          ", which is not above 0 and at most 1");
    check(batch.top_k[s] >= 0, "top_k[", s, "] is ", batch.top_k[s], ", which is below 0");
    check(batch.min_p[s] >= 0 && batch.min_p[s] <= 1, "min_p[", s, "] is ", batch.min_p[s],
          ", which is not in 0 .. 1");
    check(std::isfinite(batch.presence_penalty[s]), "presence_penalty[", s, "] is not finite");
    check(std::isfinite(batch.frequency_penalty[s]), "frequency_penalty[", s, "] is not finite");
    const float repetition = batch.repetition_penalty[s];
    check(std::isfinite(repetition) && repetition > 0, "repetition_penalty[", s, "] is ", repetition,
          ", which is not a number above 0");
    const int64_t num_logprobs = batch.num_logprobs[s];
    check(num_logprobs >= -1 && num_logprobs <= vocab_size, "num_logprobs[", s, "] is ", num_logprobs,
          ", outside -1 .. ", vocab_size, " (vocab_size)");
    num_top += std::max<int64_t>(num_logprobs, 0) * batch.num_sampled[s];
  }
  check(num_top <= kMaxInt32, "the step asks for ", num_top, " log-probabilities; at most ", kMaxInt32,
        " fit");
  check_ids("history_ids", batch.history_ids, vocab_size, "vocab_size");
  for (size_t i = 0; i < batch.history_counts.size(); ++i) {
    check(batch.history_counts[i] >= 0, "history_counts[", i, "] is ", batch.history_counts[i],
          ", which is below 0");
  }
  check_ids("bias_ids", batch.bias_ids, vocab_size, "vocab_size");
  for (size_t i = 0; i < batch.bias_values.size(); ++i) {
    check(batch.bias_values[i] < std::numeric_limits<float>::infinity(), "bias_values[", i, "] is ",
          batch.bias_values[i], ", which is neither finite nor -infinity");
  }
}

}  // namespace

void validate_options(const RunnerOptions& options) {
  const auto check_range = [](const char* name, int64_t value, int64_t min, int64_t max) {
    check(value >= min && value <= max, name, " is ", value, ", outside ", min, " .. ", max);
  };
  check_range("numThreads", options.num_threads, 1, 1024);
  check_range("blockSize", options.block_size, 1, 1 << 16);
  check_range("numBlocks", options.num_blocks, 1, kMaxInt32);
  check_range("numBlocks * blockSize", options.num_blocks * options.block_size, 1, kMaxInt32);
  check(options.memory_utilization >= 0 && options.memory_utilization <= 1, "gpuMemoryUtilization is ",
        options.memory_utilization, ", outside 0 .. 1");
  check(options.memory_utilization == 0 || options.device != "cpu", "gpuMemoryUtilization is ",
        options.memory_utilization, "; on the CPU it must be 0");
  check_range("maxStepTokens", options.max_step_tokens, 1, 1 << 20);
  check_range("maxNumSeqs", options.max_num_seqs, 1, 1 << 20);
  check(options.compute == "float32" || options.compute == "auto", "compute is '", options.compute,
        "'; it must be 'float32' or 'auto'");
  check(options.head_dtype == "auto" || options.head_dtype == "fp8", "headDtype is '", options.head_dtype,
        "'; it must be 'auto' or 'fp8'");
  check(!options.load_mtp || options.spec.num_mtp_layers > 0,
        "loadMtp is set but the checkpoint has no MTP module (numMtpLayers is 0)");
}

void validate_batch(const StepBatch& batch, const RunnerOptions& options, int64_t num_rows_before) {
  const int64_t num_seqs = batch.num_seqs(), num_tokens = batch.num_tokens();
  const int64_t vocab_size = options.spec.vocab_size;
  check(num_seqs >= 1 && num_seqs <= options.max_num_seqs, "the step has ", num_seqs,
        " sequences, outside 1 .. ", options.max_num_seqs, " (maxNumSeqs)");
  check(num_tokens >= 1 && num_tokens <= options.max_step_tokens, "the step has ", num_tokens,
        " tokens, outside 1 .. ", options.max_step_tokens, " (maxStepTokens)");
  check_size("positions", batch.positions, num_tokens);
  check_size("slot_mapping", batch.slot_mapping, num_tokens);
  check_starts("q_start", batch.q_start, num_seqs, 1, num_tokens);
  check_starts("block_table_start", batch.block_table_start, num_seqs, 1,
               static_cast<int64_t>(batch.block_table.size()));
  check_size("run_mtp", batch.run_mtp, num_seqs);
  check_size("num_drafts", batch.num_drafts, num_seqs);
  check_size("temperature", batch.temperature, num_seqs);
  check_size("top_p", batch.top_p, num_seqs);
  check_size("top_k", batch.top_k, num_seqs);
  check_size("min_p", batch.min_p, num_seqs);
  check_size("seed_low", batch.seed_low, num_seqs);
  check_size("seed_high", batch.seed_high, num_seqs);
  check_size("presence_penalty", batch.presence_penalty, num_seqs);
  check_size("frequency_penalty", batch.frequency_penalty, num_seqs);
  check_size("repetition_penalty", batch.repetition_penalty, num_seqs);
  check_size("num_logprobs", batch.num_logprobs, num_seqs);
  check_starts("history_start", batch.history_start, num_seqs, 0,
               static_cast<int64_t>(batch.history_ids.size()));
  check_size("history_counts", batch.history_counts, static_cast<int64_t>(batch.history_ids.size()));
  check_starts("bias_start", batch.bias_start, num_seqs, 0, static_cast<int64_t>(batch.bias_ids.size()));
  check_size("bias_values", batch.bias_values, static_cast<int64_t>(batch.bias_ids.size()));
  check_starts("mask_start", batch.mask_start, num_seqs, 0, static_cast<int64_t>(batch.masks.size()));
  for (size_t s = 0; s < static_cast<size_t>(num_seqs); ++s) {
    const int64_t num_words = batch.mask_start[s + 1] - batch.mask_start[s];
    check(num_words == 0 || num_words == (vocab_size + 31) / 32, "the mask of sequence ", s, " has ",
          num_words, " words; a vocabulary of ", vocab_size, " takes ", (vocab_size + 31) / 32);
  }

  check_token_ids(batch, vocab_size, num_rows_before);
  check_ids("block_table", batch.block_table, options.num_blocks, "numBlocks");
  check_tokens(batch, options);
  check_sampling(batch, vocab_size);

  for (const auto* rows : {&batch.logit_rows, &batch.draft_logit_rows}) {
    const char* name = rows == &batch.logit_rows ? "logit_rows" : "draft_logit_rows";
    check(static_cast<int64_t>(rows->size()) <= num_tokens, name, " has ", rows->size(),
          " elements, more than the step's ", num_tokens, " tokens");
    check_ids(name, *rows, num_tokens, "tokens of the step");
  }
  for (const int32_t row : batch.draft_logit_rows) {
    check(!std::binary_search(batch.q_start.begin(), batch.q_start.end(), row), "draft_logit_rows has token ",
          row, ", the first of its sequence in this step: the token before it must be in the step too");
    const auto seq =
        std::upper_bound(batch.q_start.begin(), batch.q_start.end(), row) - batch.q_start.begin() - 1;
    check(batch.run_mtp[static_cast<size_t>(seq)] == 1, "draft_logit_rows has token ", row, " of sequence ",
          seq, ", which does not run the MTP module (run_mtp)");
  }
}

}  // namespace rodin
