// Drafter: what the MTP module does in a step, after its rows were sampled. For every sequence with run_mtp
// it makes the module's cache entries of the confirmed tokens, and draws the drafts of the next step with the
// noise, the filters and the penalties that the target will use at those positions.
//
// Of a sequence whose rows in this step start at position p, n of them confirmed, entries p+1 .. p+n-1 are
// made (entry j from token j and the hidden state of token j-1), and where rows are sampled entry p+n, from
// the last token sampled. Entry p is there already or slot 0's, which holds nothing. Draft 1 is sampled from
// entry p+n, draft i+1 from an entry made of draft i and the module's own output; those entries are
// provisional and are written again when their tokens are confirmed.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/host_index.h"
#include "engine/row_sampling.h"
#include "engine/step.h"
#include "model/forward.h"

namespace rodin {

class Drafter {
 public:
  // All outlive this.
  Drafter(Forward& forward, Ops& ops, const CacheLayer& cache, int64_t block_size, int64_t vocab_size)
      : forward_(forward), ops_(ops), cache_(cache), block_size_(block_size), vocab_size_(vocab_size) {}

  // `hidden` [T, H] is the decoder layers' output of this step; reads result.sampled_ids, fills drafts and
  // draft_logits.
  void run(const StepBatch& batch, const Tensor& hidden, StepResult& result);

 private:
  // One sequence that still drafts.
  struct Active {
    int64_t seq = 0;
    int32_t row = 0;                   // of the module's last pass
    int32_t position = 0;              // of that row's token
    std::vector<int32_t> more_tokens;  // since the batch's history: of this step, then the drafts so far
    int32_t num_drafts = 0;
  };

  void add_confirmed_rows(const StepBatch& batch, const StepResult& result);
  void copy_logits(const StepBatch& batch, const Tensor& mtp_hidden, StepResult& result);
  // Samples the next draft of every active sequence; those whose logits are not finite are dropped.
  void sample_drafts(const StepBatch& batch, const Tensor& mtp_hidden);
  // Drops the sequences that have all their drafts and runs the module over the last draft of the others.
  Tensor extend(const StepBatch& batch, const Tensor& mtp_hidden);
  int32_t slot_of_position(const StepBatch& batch, int64_t seq, int32_t position) const;

  Forward& forward_;
  Ops& ops_;
  const CacheLayer cache_;
  const int64_t block_size_;
  const int64_t vocab_size_;

  // Working memory of run().
  HostIndex index_;                         // rows whose hidden states are read: most often those that draft
  HostIndex entries_;                       // rows whose cache entries are made ahead of what index_ reads
  std::vector<int32_t> hidden_rows_;        // [T'] row of the token before each of the module's rows
  std::vector<int32_t> entry_hidden_rows_;  // [rows of entries_] the same of those
  std::vector<int32_t> stored_rows_;        // [T'] row of entries_ that each of index_ is, where it is one
  std::vector<int32_t> source_rows_;        // [T'] row of the step that each was made from, or T
  std::vector<Active> active_;              // [num_active]
  std::vector<std::vector<int32_t>> drafts_;  // [S, drafts so far]
  RowSampling sampling_;
  std::vector<int32_t> rows_;       // [num_active]
  std::vector<int32_t> row_seq_;    // [num_active]
  std::vector<int32_t> positions_;  // [num_active]
  SampleResult sampled_;
};

}  // namespace rodin
