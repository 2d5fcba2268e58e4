#include "engine/drafter.h"

#include <algorithm>

#include "ops/check.h"

namespace rodin {

void Drafter::run(const StepBatch& batch, const Tensor& hidden, StepResult& result) {
  const auto num_seqs = static_cast<size_t>(batch.num_seqs());
  drafts_.resize(num_seqs);
  for (std::vector<int32_t>& drafts : drafts_) drafts.clear();
  add_confirmed_rows(batch, result);
  if (entries_.num_tokens() > 0) {
    const StepIndex index = ops_.begin_step(entries_.view(batch, block_size_, 1), 1);
    forward_.store_mtp(index, hidden, entry_hidden_rows_.data(), cache_);
  }
  if (index_.num_tokens() > 0) {
    const StepIndex index = ops_.begin_step(index_.view(batch, block_size_, 1), 1);
    Tensor mtp_hidden = stored_rows_.empty() ? forward_.run_mtp(index, hidden, hidden_rows_.data(), cache_)
                                             : forward_.run_stored_mtp(index, stored_rows_.data(), cache_);
    copy_logits(batch, mtp_hidden, result);
    while (!active_.empty()) {
      sample_drafts(batch, mtp_hidden);
      mtp_hidden = extend(batch, mtp_hidden);
    }
  }
  for (size_t s = 0; s < num_seqs; ++s) {
    result.draft_ids.insert(result.draft_ids.end(), drafts_[s].begin(), drafts_[s].end());
    result.draft_start[s + 1] = static_cast<int32_t>(result.draft_ids.size());
  }
}

void Drafter::add_confirmed_rows(const StepBatch& batch, const StepResult& result) {
  index_.clear();
  entries_.clear();
  hidden_rows_.clear();
  entry_hidden_rows_.clear();
  stored_rows_.clear();
  source_rows_.clear();
  active_.clear();
  // All entries are made at once, then what is read of some of them. Logits may be wanted of any row.
  const bool stores_first = forward_.can_store_mtp() && batch.draft_logit_rows.empty();
  int32_t sampled = 0;  // first sampled row of the sequence
  for (int64_t s = 0; s < batch.num_seqs(); ++s) {
    const auto at = static_cast<size_t>(s);
    const int32_t begin = batch.q_start[at], end = batch.q_start[at + 1];
    const int32_t num_sampled = batch.num_sampled[at];
    if (batch.run_mtp[at] != 0) {
      const auto token = [&](int32_t row) { return batch.token_ids[static_cast<size_t>(row)]; };
      const auto outcome = [&](int32_t row) {  // what a sampled row of this sequence gave
        return result.sampled_ids[static_cast<size_t>(sampled + row - (end - num_sampled))];
      };
      int32_t confirmed_end = num_sampled == 0 ? end : end - num_sampled + 1;
      while (num_sampled > 0 && confirmed_end < end && token(confirmed_end) == outcome(confirmed_end - 1)) {
        ++confirmed_end;
      }
      const auto add = [&](int32_t token_id, int32_t hidden_row, int32_t source_row, bool is_read) {
        const int32_t position = batch.positions[static_cast<size_t>(hidden_row)] + 1;
        const int32_t slot = slot_of_position(batch, s, position);
        if (stores_first) {
          if (is_read) stored_rows_.push_back(static_cast<int32_t>(entries_.num_tokens()));
          entries_.add_row(token_id, position - 1, position, slot);
          entry_hidden_rows_.push_back(hidden_row);
        } else {
          hidden_rows_.push_back(hidden_row);
          source_rows_.push_back(source_row);
        }
        if (is_read || !stores_first)
          index_.add_row(token_id, position - 1, position, stores_first ? -1 : slot);
      };
      for (int32_t row = begin + 1; row < confirmed_end; ++row) add(token(row), row - 1, row, false);
      const int32_t last = num_sampled > 0 ? outcome(confirmed_end - 1) : -1;
      if (last >= 0) {
        const bool drafts = batch.num_drafts[at] > 0;
        add(last, confirmed_end - 1, static_cast<int32_t>(batch.num_tokens()), drafts);
        if (drafts) {
          Active active;
          active.seq = s;
          active.row = static_cast<int32_t>(index_.num_tokens()) - 1;
          active.position = batch.positions[static_cast<size_t>(confirmed_end - 1)] + 1;
          for (int32_t row = end - num_sampled; row < confirmed_end; ++row) {
            active.more_tokens.push_back(outcome(row));
          }
          active.num_drafts = batch.num_drafts[at];
          active_.push_back(std::move(active));
        }
      }
    }
    index_.end_sequence();
    entries_.end_sequence();
    sampled += num_sampled;
  }
}

void Drafter::copy_logits(const StepBatch& batch, const Tensor& mtp_hidden, StepResult& result) {
  rows_.clear();
  for (const int32_t row : batch.draft_logit_rows) {
    const auto found = std::find(source_rows_.begin(), source_rows_.end(), row);
    check(found != source_rows_.end(), "draft_logit_rows: token ", row, " is a draft that was rejected");
    rows_.push_back(static_cast<int32_t>(found - source_rows_.begin()));
  }
  const auto total = static_cast<int64_t>(rows_.size());
  for (int64_t first = 0; first < total; first += forward_.max_logit_rows()) {
    const int64_t count = std::min(forward_.max_logit_rows(), total - first);
    const Tensor logits = forward_.mtp_logits(mtp_hidden, rows_.data() + first, count);
    ops_.download(result.draft_logits.data() + first * logits.cols, logits.data,
                  static_cast<size_t>(count * logits.cols) * sizeof(float));
  }
}

void Drafter::sample_drafts(const StepBatch& batch, const Tensor& mtp_hidden) {
  const auto total = static_cast<int64_t>(active_.size());
  for (int64_t first = 0; first < total; first += forward_.max_logit_rows()) {
    const int64_t count = std::min(forward_.max_logit_rows(), total - first);
    sampling_.clear();
    rows_.clear();
    row_seq_.clear();
    positions_.clear();
    for (int64_t i = first; i < first + count; ++i) {
      const Active& active = active_[static_cast<size_t>(i)];
      rows_.push_back(active.row);
      row_seq_.push_back(sampling_.append(batch, active.seq, active.more_tokens.data(),
                                          static_cast<int64_t>(active.more_tokens.size()), false));
      positions_.push_back(active.position + 1);
    }
    SampleArgs args;
    args.batch = &sampling_.batch();
    args.logits = forward_.mtp_logits(mtp_hidden, rows_.data(), count).row<float>(0);
    args.row_seq = row_seq_.data();
    args.row_position = positions_.data();
    args.num_rows = count;
    args.vocab_size = vocab_size_;
    args.result = &sampled_;
    ops_.sample(args);
    for (int64_t i = 0; i < count; ++i) {
      Active& active = active_[static_cast<size_t>(first + i)];
      const int32_t id = sampled_.sampled_ids[static_cast<size_t>(i)];
      if (id < 0) {
        active.num_drafts = 0;
        continue;
      }
      drafts_[static_cast<size_t>(active.seq)].push_back(id);
      active.more_tokens.push_back(id);
    }
  }
}

Tensor Drafter::extend(const StepBatch& batch, const Tensor& mtp_hidden) {
  std::erase_if(active_, [this](const Active& active) {
    return static_cast<int32_t>(drafts_[static_cast<size_t>(active.seq)].size()) >= active.num_drafts;
  });
  if (active_.empty()) return mtp_hidden;
  index_.clear();
  hidden_rows_.clear();
  int64_t seq = 0;
  for (Active& active : active_) {
    for (; seq < active.seq; ++seq) index_.end_sequence();
    hidden_rows_.push_back(active.row);
    active.row = static_cast<int32_t>(index_.num_tokens());
    active.position += 1;
    index_.add_row(active.more_tokens.back(), active.position - 1, active.position,
                   slot_of_position(batch, active.seq, active.position));
  }
  for (; seq < batch.num_seqs(); ++seq) index_.end_sequence();
  const StepIndex index = ops_.begin_step(index_.view(batch, block_size_, 1), 1);
  return forward_.run_mtp(index, mtp_hidden, hidden_rows_.data(), cache_);
}

int32_t Drafter::slot_of_position(const StepBatch& batch, int64_t seq, int32_t position) const {
  const int64_t entry = batch.block_table_start[static_cast<size_t>(seq)] + position / block_size_;
  return static_cast<int32_t>(batch.block_table[static_cast<size_t>(entry)] * block_size_ +
                              position % block_size_);
}

}  // namespace rodin
