// The boundary between host code and kernels: one POD params struct and one launcher per kernel family.
// Pointers are device memory unless a comment says so. Activations are bf16, strides count elements.
//
// Letters of the shapes: T tokens, S sequences, H hidden size, V vocabulary, A heads, E routed experts,
// k experts a token, K inputs and N outputs of a linear layer.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/kernels_attention.h"
#include "ops/tensor.h"
#include "ops/weight.h"

namespace rodin::cuda {

// ---- linear.cuh, linear_<dtype>.cu ----------------------------------------------------------------------

struct LinearIo {
  const void* x = nullptr;  // bf16 [*, K]
  int64_t x_stride = 0;
  void* out = nullptr;  // bf16 or float32 [*, N]
  int64_t out_stride = 0;
};

// Tokens of one expert that share a weight tile.
struct MoeTile {
  int32_t expert;  // E: the shared expert
  int32_t first;   // index into MoePlan::order (shared expert: the first token)
  int32_t count;
  int32_t unused;
};

// Device arrays that run_moe_plan fills.
struct MoePlan {
  int32_t* order = nullptr;      // [T * k] slots t * k + j, sorted by expert
  MoeTile* tiles = nullptr;      // [max_tiles]
  int32_t* num_tiles = nullptr;  // [1]
};

// out = x W^T + bias, in one of these forms:
// - plain:   weight[0], io[0]
// - pair:    two of them with the same x and K: weight[i], io[i]
// - gated:   out = silu(x weight[0]^T) * (x weight[1]^T)
// - batched: for z < num_batches, `batch_rows` rows of weight[0] from z * weight_batch + weight_offset on, x
// and
//            out moved by z * x_batch and z * out_batch elements
// - grouped (table[0] set): the tiles of a MoePlan over table[0][expert] (gated: and table[1][expert]);
//            row a of x and out is slot a (x: a / x_divisor) in io[0], or token a in io[1] for the shared
//            expert
struct LinearParams {
  WeightView weight[2];
  LinearIo io[2];
  Dtype weight_dtype = Dtype::kBF16;
  Dtype out_dtype = Dtype::kBF16;
  bool is_gated = false;
  bool is_pair = false;
  bool is_x_aligned = false;  // every row of x begins at a multiple of 16 bytes
  int32_t num_tokens = 0;     // T; grouped: expected tokens of one expert, chooses the tile size
  int32_t max_rows = 0;       // most rows of any weight (batched: batch_rows)
  int32_t max_cols = 0;

  int32_t num_batches = 1;
  int32_t batch_rows = 0;  // 0: not batched
  int64_t weight_batch = 0;
  int64_t weight_offset = 0;
  int64_t x_batch = 0;
  int64_t out_batch = 0;

  const WeightView* table[2] = {nullptr, nullptr};  // [E + 1]
  MoePlan plan;
  int32_t max_tiles = 0;
  int32_t num_experts = 0;
  int32_t x_divisor = 1;
  int32_t tile_tokens = 0;  // most tokens of a tile
  bool has_shared = false;  // the shared expert is one of the grouped
};

// Tokens of one tile for a call with `num_tokens` tokens (a MoePlan must be made for the same tile size).
int linear_tile_tokens(int num_tokens);
void run_linear(const LinearParams& params, cudaStream_t stream);
// Raises the kernels' shared memory limits; once per device.
void prepare_linear();

// ---- norm.cu --------------------------------------------------------------------------------------------

struct NormParams {
  const void* x = nullptr;  // [T, N]; add_rms_norm: the residual, float32, updated in place
  Dtype x_dtype = Dtype::kF32;
  int64_t x_stride = 0;
  const void* delta = nullptr;  // [T, N] bf16 or null
  int64_t delta_stride = 0;
  const float* weight = nullptr;  // [N]
  float eps = 0;
  void* out = nullptr;  // [T, N] bf16; may be x
  int64_t out_stride = 0;
  int32_t num_rows = 0;  // T
  int32_t cols = 0;      // N
};
void run_rms_norm(const NormParams& params, cudaStream_t stream);
// Whether rows stay in registers: their parts are aligned and they are short enough.
bool is_norm_in_registers(const NormParams& params);

// ---- embed.cu -------------------------------------------------------------------------------------------

struct SampleOutcome {
  int32_t id;  // -1: none
  float logprob;
  double lse;  // log-sum-exp of the raw logits, where logprobs are asked for
};

struct EmbedParams {
  WeightView table;                        // [V, H]
  const int32_t* token_ids = nullptr;      // [T] below 0: -1 - r is sampled[r].id
  const SampleOutcome* sampled = nullptr;  // [R] of the step before
  float* out = nullptr;                    // [T, H]
  int64_t out_stride = 0;
  int32_t num_tokens = 0;
};
void run_embed(const EmbedParams& params, cudaStream_t stream);

struct GatherParams {
  const void* from = nullptr;
  int64_t from_row_bytes = 0;     // from one row to the next
  const int32_t* rows = nullptr;  // [num_rows]
  void* to = nullptr;
  int64_t to_row_bytes = 0;
  int64_t row_bytes = 0;  // copied of each row
  int32_t num_rows = 0;
};
void run_gather_rows(const GatherParams& params, cudaStream_t stream);

// Widens a matrix to bf16, scales applied: FP8 whose scale blocks the kernels do not take.
struct WidenParams {
  WeightView from;
  const float* scale = nullptr;  // [ceil(rows / block_rows), ceil(cols / block_cols)]
  int32_t block_rows = 1;
  int32_t block_cols = 1;
  void* to = nullptr;  // bf16 [rows, to_row_bytes]
  int64_t to_row_bytes = 0;
};
void run_widen(const WidenParams& params, cudaStream_t stream);

// W_UK of every head, transposed: to[h * lora_rank + c][n] = from[h * head_rows + n][c], padding zeroed.
struct TransposeParams {
  WeightView from;     // [A * head_rows, lora_rank]
  void* to = nullptr;  // [A * lora_rank, to_row_bytes], same dtype
  int64_t to_row_bytes = 0;
  int32_t num_heads = 0;
  int32_t head_rows = 0;  // nope_dim + v_dim
  int32_t nope_dim = 0;
  int32_t lora_rank = 0;
  // FP8: scale_to[(h * lora_rank + c) / to_block_rows][n / kBlockK]
  float* scale_to = nullptr;
  int32_t to_block_rows = 1;
  int32_t to_scale_cols = 0;
};
void run_transpose_heads(const TransposeParams& params, cudaStream_t stream);

// ---- route.cu, moe.cu -----------------------------------------------------------------------------------

struct RouteKernelParams {
  const float* logits = nullptr;           // [T, E]
  const float* correction_bias = nullptr;  // [E] or null
  int32_t* expert_ids = nullptr;           // [T, ids_stride]
  int64_t ids_stride = 0;
  float* expert_weights = nullptr;  // [T, weights_stride]
  int64_t weights_stride = 0;
  int32_t num_tokens = 0;
  RouteParams route;
  MoePlan plan;  // of one token alone, order null where run_moe_plan makes it
  bool has_shared = false;
};
void run_route(const RouteKernelParams& params, cudaStream_t stream);

// The norm ahead of a MoE layer, its router and run_route in one launch, for few tokens.
constexpr int kGateFewTokens = 4;

struct MoeGateParams {
  NormParams norm;
  WeightView router;  // [E, H] bf16
  RouteKernelParams route;
  float* logits = nullptr;   // [T, E] what route.logits names
  uint32_t* done = nullptr;  // [kGateFewTokens] 0 before and after
};
bool is_moe_gate(const MoeGateParams& params);
void run_moe_gate(const MoeGateParams& params, cudaStream_t stream);

struct MoePlanParams {
  const int32_t* expert_ids = nullptr;  // [T, ids_stride]
  int64_t ids_stride = 0;
  int32_t num_tokens = 0;
  int32_t experts_per_token = 0;
  int32_t num_experts = 0;
  bool has_shared = false;
  int32_t tile_tokens = 0;
  MoePlan plan;
};
// Most tiles the plan can hold.
int32_t moe_max_tiles(const MoePlanParams& params);
void run_moe_plan(const MoePlanParams& params, cudaStream_t stream);

struct MoeCombineParams {
  const void* routed = nullptr;           // bf16 [T * k, H]
  const void* shared = nullptr;           // bf16 [T, H] or null
  int64_t stride = 0;                     // of both
  const float* expert_weights = nullptr;  // [T, weights_stride]
  int64_t weights_stride = 0;
  void* out = nullptr;  // bf16 [T, H]
  int64_t out_stride = 0;
  int32_t num_tokens = 0;
  int32_t cols = 0;  // H
  int32_t experts_per_token = 0;
};
void run_moe_combine(const MoeCombineParams& params, cudaStream_t stream);

// run_moe_combine and the norm behind a MoE layer in one launch; norm.delta is not used.
struct MoeNormParams {
  MoeCombineParams combine;  // but out
  NormParams norm;
};
bool is_moe_norm(const MoeNormParams& params);
void run_moe_norm(const MoeNormParams& params, cudaStream_t stream);

// ---- sample.cu, sample_select.cu ------------------------------------------------------------------------

constexpr int kSampleChunk = 4096;   // logits per block of the scanning kernels
constexpr int kSampleMaxTop = 1024;  // most likeliest tokens the GPU selects for a row

// Everything about one sampled row.
struct SampleRow {
  float temperature;
  float lowest_score;  // log(min_p), or the lowest finite float
  int32_t top_k;       // 0 is off
  float top_p;         // 1 is off
  uint32_t seed_low;
  uint32_t seed_high;
  int32_t position;
  int32_t num_top;  // -1: no logprobs; 0: of the sampled token alone
  int32_t top_start;
  int32_t bias_begin, bias_end;
  int32_t history_begin, history_end;
  int32_t mask_begin, mask_end;  // words of masks: ceil(V / 32), or none
  float repetition, frequency, presence;

  __host__ __device__ bool is_adjusted() const {
    return bias_begin != bias_end || history_begin != history_end || mask_begin != mask_end;
  }
  __host__ __device__ bool needs_noise() const { return temperature != 0 && !is_filtered(); }
  __host__ __device__ bool needs_selection() const { return temperature != 0 && is_filtered(); }
  __host__ __device__ bool has_device_top() const { return num_top > 0 && num_top <= kSampleMaxTop; }
  __host__ __device__ bool is_filtered() const {
    return lowest_score > -3.4028234663852886e38f || top_k != 0 || top_p < 1;
  }
};

struct SampleChunk {
  float max_logit;  // of the raw logits
  float max_z;      // after bias and penalties
  int32_t max_id;   // lowest id that has max_z
  int32_t is_bad;   // a NaN or an infinity in the raw logits
};

struct SampleNoiseChunk {
  float best;  // largest score + noise
  int32_t id;
  double sum;  // of exp(logit - max_logit of the row)
};

struct SampleParams {
  const float* logits = nullptr;    // [R, V]
  float* adjusted = nullptr;        // [R, V] rows with bias, history or mask
  const SampleRow* rows = nullptr;  // [R]
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  const int32_t* history_ids = nullptr;
  const int32_t* history_counts = nullptr;
  const int32_t* masks = nullptr;            // bit id % 32 of word id / 32 of a row's words, 1 is allowed
  SampleChunk* chunks = nullptr;             // [R, num_chunks]
  SampleNoiseChunk* noise_chunks = nullptr;  // [R, num_chunks]
  SampleOutcome* results = nullptr;          // [R]
  int32_t* top_ids = nullptr;                // [top_start of the end]
  float* top_logprobs = nullptr;
  int32_t num_rows = 0;    // R
  int32_t vocab_size = 0;  // V
  int32_t num_chunks = 0;  // ceil(V / kSampleChunk)
  bool has_adjusted = false;
  bool has_noise = false;      // some row's chunks of noise or sums are needed
  bool has_selection = false;  // some row has filters or asks for likeliest tokens
};
void run_sample(const SampleParams& params, cudaStream_t stream);
// Its part for rows with filters, and for likeliest tokens.
void run_sample_select(const SampleParams& params, cudaStream_t stream);
// Throws where the vocabulary is too large for it.
void prepare_sample_select(int32_t vocab_size);

}  // namespace rodin::cuda
