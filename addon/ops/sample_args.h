// What sampling needs and gives: the sampling half of a step's batch and result (engine/step.h builds on
// them), and the arguments of Ops::sample.
//
// Row r, of sequence s, from its raw logits x:
//   z     = x + bias; then for every id in the history: z > 0 ? z / repetition : z * repetition, then
//           z -= frequency * count, then z -= presence where count > 0; then z = -infinity where the
//           sequence's mask has a 0
//   greedy (temperature 0): the largest z, ties to the lower id
//   otherwise score = (z - max z) / temperature, and on the softmax of the scores, each filter over what the
//   one before has left: min_p keeps p >= min_p * max p; top_k the k likeliest (ties: lower ids); top_p the
//   shortest run of the likeliest whose mass reaches top_p of what is left
//   token = the survivor with the largest score + gumbel_noise(seed, position, id), ties to the lower id
// Log-probabilities are of the raw logits x. A row with a NaN or an infinity in x, or whose z has no finite
// largest value (everything banned, or an overflow), is marked non_finite and gets id -1.
#pragma once

#include <cstdint>
#include <vector>

namespace rodin {

// S sequences; named like server/engine/step-batch.ts.
struct SampleBatch {
  std::vector<float> temperature;         // [S] 0 is greedy
  std::vector<float> top_p;               // [S] 1 is off
  std::vector<int32_t> top_k;             // [S] 0 is off
  std::vector<float> min_p;               // [S] 0 is off
  std::vector<uint32_t> seed_low;         // [S]
  std::vector<uint32_t> seed_high;        // [S]
  std::vector<float> presence_penalty;    // [S]
  std::vector<float> frequency_penalty;   // [S]
  std::vector<float> repetition_penalty;  // [S] 1 is off
  std::vector<int32_t> num_logprobs;      // [S] -1: none; 0: of the sampled token; k: also the k likeliest

  std::vector<int32_t> history_start;   // [S + 1] empty range for sequences without a penalty
  std::vector<int32_t> history_ids;     // [history_start[S]] distinct ids seen in prompt or completion
  std::vector<int32_t> history_counts;  // [history_start[S]] times in the completion

  std::vector<int32_t> bias_start;  // [S + 1]
  std::vector<int32_t> bias_ids;    // [bias_start[S]]
  std::vector<float> bias_values;   // [bias_start[S]] -infinity bans

  // Which tokens a sequence's grammar leaves: bit id % 32 of word id / 32, 1 is allowed. ceil(V / 32) words,
  // or none where nothing is masked.
  std::vector<int32_t> mask_start;  // [S + 1]
  std::vector<int32_t> masks;       // [mask_start[S]]
};

// R sampled rows.
struct SampleResult {
  std::vector<int32_t> sampled_ids;     // [R]
  std::vector<float> sampled_logprobs;  // [R] 0 where not asked for
  std::vector<int32_t> top_start;       // [R + 1]
  std::vector<int32_t> top_ids;         // [top_start[R]] by falling logit, ties by lower id
  std::vector<float> top_logprobs;      // [top_start[R]]
  std::vector<uint8_t> non_finite;      // [R]
};

struct SampleScratch;

struct SampleArgs {
  const SampleBatch* batch = nullptr;     // host memory, checked by validate_batch
  const float* logits = nullptr;          // [R, vocab_size] raw, device memory; left as they are
  const int32_t* row_seq = nullptr;       // [R] sequence of each row, host memory
  const int32_t* row_position = nullptr;  // [R] position of the token being sampled: its row's position + 1
  int64_t num_rows = 0;                   // R
  int64_t vocab_size = 0;
  SampleScratch* scratch = nullptr;  // of the CPU: at least as many workers as the pool
  SampleResult* result = nullptr;    // host memory; sized and filled
};

}  // namespace rodin
