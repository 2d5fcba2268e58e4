#include "engine/validate.h"

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "tests/native/test.h"

namespace rodin {
namespace {

RunnerOptions make_options() {
  RunnerOptions options;
  options.spec.vocab_size = 100;
  options.spec.max_position_embeddings = 64;
  options.spec.num_mtp_layers = 1;
  options.block_size = 4;
  options.num_blocks = 10;
  options.max_step_tokens = 8;
  options.max_num_seqs = 3;
  options.load_mtp = true;
  return options;
}

// Sequence 0 prefills positions 3 .. 6 in blocks 7 and 2; sequence 1 decodes position 8 in blocks 1, 7, 9.
StepBatch make_batch() {
  StepBatch batch;
  batch.token_ids = {5, 6, 7, 8, 99};
  batch.positions = {3, 4, 5, 6, 8};
  batch.slot_mapping = {-1, 8, 9, 10, 36};
  batch.q_start = {0, 4, 5};
  batch.block_table_start = {0, 2, 5};
  batch.block_table = {7, 2, 1, 7, 9};
  batch.num_sampled = {0, 1};
  batch.run_mtp = {1, 1};
  batch.num_drafts = {0, 3};
  batch.temperature = {0, 1};
  batch.top_p = {1, 0.9f};
  batch.top_k = {0, 5};
  batch.min_p = {0, 0.1f};
  batch.seed_low = {0, 1};
  batch.seed_high = {0, 1};
  batch.presence_penalty = {0, 1};
  batch.frequency_penalty = {0, -1};
  batch.repetition_penalty = {1, 1.5f};
  batch.num_logprobs = {-1, 100};
  batch.history_start = {0, 0, 2};
  batch.history_ids = {0, 99};
  batch.history_counts = {0, 3};
  batch.bias_start = {0, 1, 2};
  batch.bias_ids = {99, 0};
  batch.bias_values = {-std::numeric_limits<float>::infinity(), 2};
  batch.mask_start = {0, 0, 4};
  batch.masks = {-1, 0, 7, -1};
  batch.logit_rows = {0, 4};
  batch.draft_logit_rows = {1, 3};
  return batch;
}

struct BadBatch {
  const char* message;  // a part of what must be said
  std::function<void(StepBatch&, RunnerOptions&)> spoil;
};

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInfinity = std::numeric_limits<float>::infinity();
constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
constexpr int32_t kMax = std::numeric_limits<int32_t>::max();

const std::vector<BadBatch> kBadBatches = {
    {"0 sequences", [](StepBatch& b, RunnerOptions&) { b = StepBatch{}; }},
    {"maxNumSeqs", [](StepBatch&, RunnerOptions& o) { o.max_num_seqs = 1; }},
    {"maxStepTokens", [](StepBatch&, RunnerOptions& o) { o.max_step_tokens = 4; }},
    {"positions has 4", [](StepBatch& b, RunnerOptions&) { b.positions.pop_back(); }},
    {"slot_mapping has 6", [](StepBatch& b, RunnerOptions&) { b.slot_mapping.push_back(1); }},
    {"q_start has 2", [](StepBatch& b, RunnerOptions&) { b.q_start.pop_back(); }},
    {"q_start[0]", [](StepBatch& b, RunnerOptions&) { b.q_start[0] = 1; }},
    {"q_start[1]", [](StepBatch& b, RunnerOptions&) { b.q_start[1] = 0; }},
    {"q_start[1]", [](StepBatch& b, RunnerOptions&) { b.q_start[1] = kMin; }},
    {"q_start[2]", [](StepBatch& b, RunnerOptions&) { b.q_start[1] = kMax; }},
    {"q_start ends at 6", [](StepBatch& b, RunnerOptions&) { b.q_start[2] = 6; }},
    {"block_table_start ends at 4", [](StepBatch& b, RunnerOptions&) { b.block_table_start[2] = 4; }},
    {"block_table_start[1]", [](StepBatch& b, RunnerOptions&) { b.block_table_start[1] = -1; }},
    {"block_table[2] is 10", [](StepBatch& b, RunnerOptions&) { b.block_table[2] = 10; }},
    {"block_table[0] is -1", [](StepBatch& b, RunnerOptions&) { b.block_table[0] = -1; }},
    {"does not reach position 8",
     [](StepBatch& b, RunnerOptions&) {
       b.block_table.pop_back();
       b.block_table_start[2] = 4;
     }},
    {"token_ids[0] is 100", [](StepBatch& b, RunnerOptions&) { b.token_ids[0] = 100; }},
    {"token_ids[4] is -2147483648", [](StepBatch& b, RunnerOptions&) { b.token_ids[4] = kMin; }},
    {"positions[0] is -1", [](StepBatch& b, RunnerOptions&) { b.positions[0] = -1; }},
    {"positions[4] is 64", [](StepBatch& b, RunnerOptions&) { b.positions[4] = 64; }},
    {"consecutive", [](StepBatch& b, RunnerOptions&) { b.positions[2] = 6; }},
    {"slot_mapping[1] is 9", [](StepBatch& b, RunnerOptions&) { b.slot_mapping[1] = 9; }},
    {"slot_mapping[0] is -2", [](StepBatch& b, RunnerOptions&) { b.slot_mapping[0] = -2; }},
    {"two tokens of the step write slot 8",
     [](StepBatch& b, RunnerOptions&) {
       b.block_table[4] = 2;
       b.slot_mapping[4] = 8;
     }},
    {"num_sampled[0] is 5", [](StepBatch& b, RunnerOptions&) { b.num_sampled[0] = 5; }},
    {"num_sampled[1] is -1", [](StepBatch& b, RunnerOptions&) { b.num_sampled[1] = -1; }},
    {"run_mtp has 1", [](StepBatch& b, RunnerOptions&) { b.run_mtp.pop_back(); }},
    {"run_mtp[1] is 2", [](StepBatch& b, RunnerOptions&) { b.run_mtp[1] = 2; }},
    {"num_drafts has 3", [](StepBatch& b, RunnerOptions&) { b.num_drafts.push_back(0); }},
    {"num_drafts[1] is 9", [](StepBatch& b, RunnerOptions&) { b.num_drafts[1] = 9; }},
    {"num_drafts[1] is -1", [](StepBatch& b, RunnerOptions&) { b.num_drafts[1] = -1; }},
    {"has no sampled row", [](StepBatch& b, RunnerOptions&) { b.num_drafts[0] = 1; }},
    {"does not run the MTP module", [](StepBatch& b, RunnerOptions&) { b.run_mtp[1] = 0; }},
    {"does not reach position 12 of the MTP module",
     [](StepBatch& b, RunnerOptions&) { b.num_drafts[1] = 4; }},
    {"MTP module's entries of sequence 1 reach position 11",
     [](StepBatch&, RunnerOptions& o) { o.spec.max_position_embeddings = 11; }},
    {"slot 37 of the MTP module",
     [](StepBatch& b, RunnerOptions&) {
       b.block_table[1] = 9;
       b.slot_mapping = {-1, 36, 37, 38, -1};
     }},
    {"draft_logit_rows has token 1 of sequence 0", [](StepBatch& b, RunnerOptions&) { b.run_mtp[0] = 0; }},
    {"temperature has 1", [](StepBatch& b, RunnerOptions&) { b.temperature.pop_back(); }},
    {"temperature[1]", [](StepBatch& b, RunnerOptions&) { b.temperature[1] = kNan; }},
    {"temperature[1]", [](StepBatch& b, RunnerOptions&) { b.temperature[1] = -1; }},
    {"temperature[1]", [](StepBatch& b, RunnerOptions&) { b.temperature[1] = kInfinity; }},
    {"top_p[0]", [](StepBatch& b, RunnerOptions&) { b.top_p[0] = 0; }},
    {"top_p[0]", [](StepBatch& b, RunnerOptions&) { b.top_p[0] = kNan; }},
    {"top_k[1]", [](StepBatch& b, RunnerOptions&) { b.top_k[1] = -1; }},
    {"min_p[1]", [](StepBatch& b, RunnerOptions&) { b.min_p[1] = 1.5f; }},
    {"seed_high has 3", [](StepBatch& b, RunnerOptions&) { b.seed_high.push_back(0); }},
    {"presence_penalty[0]", [](StepBatch& b, RunnerOptions&) { b.presence_penalty[0] = kNan; }},
    {"frequency_penalty[0]", [](StepBatch& b, RunnerOptions&) { b.frequency_penalty[0] = kInfinity; }},
    {"repetition_penalty[0]", [](StepBatch& b, RunnerOptions&) { b.repetition_penalty[0] = 0; }},
    {"num_logprobs[1] is 101", [](StepBatch& b, RunnerOptions&) { b.num_logprobs[1] = 101; }},
    {"num_logprobs[0] is -2", [](StepBatch& b, RunnerOptions&) { b.num_logprobs[0] = -2; }},
    {"history_start[1]", [](StepBatch& b, RunnerOptions&) { b.history_start[1] = -3; }},
    {"history_counts has 1", [](StepBatch& b, RunnerOptions&) { b.history_counts.pop_back(); }},
    {"history_counts[1]", [](StepBatch& b, RunnerOptions&) { b.history_counts[1] = -1; }},
    {"history_ids[1] is 100", [](StepBatch& b, RunnerOptions&) { b.history_ids[1] = 100; }},
    {"mask_start has 2", [](StepBatch& b, RunnerOptions&) { b.mask_start.pop_back(); }},
    {"mask_start ends at 4", [](StepBatch& b, RunnerOptions&) { b.masks.pop_back(); }},
    {"mask of sequence 1 has 3 words",
     [](StepBatch& b, RunnerOptions&) {
       b.masks.pop_back();
       b.mask_start[2] = 3;
     }},
    {"bias_start ends at 2", [](StepBatch& b, RunnerOptions&) { b.bias_ids.push_back(0); }},
    {"bias_values has 1", [](StepBatch& b, RunnerOptions&) { b.bias_values.pop_back(); }},
    {"bias_ids[0] is 2147483647", [](StepBatch& b, RunnerOptions&) { b.bias_ids[0] = kMax; }},
    {"bias_values[1]", [](StepBatch& b, RunnerOptions&) { b.bias_values[1] = kInfinity; }},
    {"bias_values[1]", [](StepBatch& b, RunnerOptions&) { b.bias_values[1] = kNan; }},
    {"logit_rows[1] is 5", [](StepBatch& b, RunnerOptions&) { b.logit_rows[1] = 5; }},
    {"logit_rows has 6", [](StepBatch& b, RunnerOptions&) { b.logit_rows.assign(6, 0); }},
    {"draft_logit_rows[0] is -1", [](StepBatch& b, RunnerOptions&) { b.draft_logit_rows[0] = -1; }},
    {"draft_logit_rows has token 4", [](StepBatch& b, RunnerOptions&) { b.draft_logit_rows[0] = 4; }},
    {"draft_logit_rows has token 0", [](StepBatch& b, RunnerOptions&) { b.draft_logit_rows[0] = 0; }},
    {"loadMtp", [](StepBatch&, RunnerOptions& o) { o.load_mtp = false; }},
};

TEST("validate: a good batch passes") { validate_batch(make_batch(), make_options()); }

const bool kRegistered = [] {
  for (const BadBatch& bad : kBadBatches) {
    test::add_test(std::string("validate: rejects ") + bad.message, [&bad] {
      StepBatch batch = make_batch();
      RunnerOptions options = make_options();
      bad.spoil(batch, options);
      CHECK_THROWS(validate_batch(batch, options), bad.message);
    });
  }
  return true;
}();

TEST("validate: options") {
  validate_options(make_options());
  const auto rejects = [](const char* message, const std::function<void(RunnerOptions&)>& spoil) {
    RunnerOptions options = make_options();
    spoil(options);
    CHECK_THROWS(validate_options(options), message);
  };
  rejects("numThreads", [](RunnerOptions& o) { o.num_threads = 0; });
  rejects("blockSize", [](RunnerOptions& o) { o.block_size = 0; });
  rejects("numBlocks is 0", [](RunnerOptions& o) { o.num_blocks = 0; });
  rejects("numBlocks * blockSize", [](RunnerOptions& o) { o.num_blocks = int64_t{1} << 30; });
  rejects("maxStepTokens", [](RunnerOptions& o) { o.max_step_tokens = 0; });
  rejects("maxNumSeqs", [](RunnerOptions& o) { o.max_num_seqs = int64_t{1} << 40; });
  rejects("compute is 'int8'", [](RunnerOptions& o) { o.compute = "int8"; });
  rejects("no MTP module", [](RunnerOptions& o) { o.spec.num_mtp_layers = 0; });
}

}  // namespace
}  // namespace rodin
