// One step's batch and result as flat arrays: twin of server/engine/step-batch.ts.
// S sequences, T tokens in all, R = sum(num_sampled) sampled rows.
//
// Sequence s owns tokens q_start[s] .. q_start[s+1]-1. The last num_sampled[s] of them are sampled: 0 in
// the middle of a prefill, 1 otherwise (1 + drafts when drafts are verified: the first sampled row is the
// last confirmed token, the others are drafts). A draft is accepted where it equals the token sampled from
// the row before it and all drafts before it were accepted; whatever follows a rejected draft means nothing.
// Sampled rows are numbered in ascending order of their token. The sampling half is in ops/sample_args.h.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/sample_args.h"

namespace rodin {

// Most drafts of a sequence in one step.
constexpr int32_t kMaxDrafts = 8;

struct StepBatch : SampleBatch {
  // [T] below 0 in a sequence's only sampled row: -1 - r is the token that row r of the step before sampled
  std::vector<int32_t> token_ids;
  std::vector<int32_t> positions;     // [T] absolute position of each token
  std::vector<int32_t> slot_mapping;  // [T] block_id * block_size + offset; -1: already there, do not write
  std::vector<int32_t> q_start;       // [S + 1]
  std::vector<int32_t> block_table_start;  // [S + 1]
  std::vector<int32_t> block_table;        // [block_table_start[S]] blocks covering positions 0 .. last
  std::vector<int32_t> num_sampled;        // [S]
  std::vector<uint8_t> run_mtp;            // [S] 1: the MTP module's entries of the confirmed tokens are made
  std::vector<int32_t> num_drafts;         // [S] drafts wanted for the next step; 0 .. kMaxDrafts

  std::vector<int32_t> logit_rows;        // [L] token indices whose raw logits come back
  std::vector<int32_t> draft_logit_rows;  // [D] token indices whose MTP logits come back

  int64_t num_seqs() const { return static_cast<int64_t>(num_sampled.size()); }
  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
  int64_t num_sampled_rows() const {
    int64_t rows = 0;
    for (int32_t n : num_sampled) rows += n;
    return rows;
  }
};

struct StepResult : SampleResult {
  std::vector<float> logits;         // [L, vocab_size]
  std::vector<float> draft_logits;   // [D, vocab_size]
  std::vector<int32_t> draft_start;  // [S + 1]
  std::vector<int32_t>
      draft_ids;  // [draft_start[S]] of each sequence, in order; fewer where logits are not finite
  double step_micros = 0;
  double draft_micros = 0;   // of step_micros, what the MTP module took
  double device_micros = 0;  // from the step's first work on the device to its last; 0 where not measured
  double idle_micros = 0;    // since the end of the step before, what the device waited for this one
};

}  // namespace rodin
