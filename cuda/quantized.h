// Params and launchers of the kernels on Hopper's bulk tensor copies and warpgroup products: as kernels.h,
// with its letters.
#pragma once

#include "cuda/kernels.h"

namespace rodin::cuda {

// ---- quantize.cu, linear_wgmma.cu -----------------------------------------------------------------------

// Of a matrix, for the bulk tensor copies: what cuTensorMapEncodeTiled fills (tensor_map.h).
struct alignas(128) TensorMap {
  uint64_t words[16];  // [16]
};

// Activations as e4m3 with a scale for each token and kBlockK channels: the largest magnitude / 448.
struct QuantizedView {
  void* data = nullptr;    // e4m3 [rows, stride], zeros behind the last channel
  float* scale = nullptr;  // [stride / kBlockK, scale_stride], one row of x after the other
  int64_t stride = 0;      // channels rounded up to kBlockK
  int64_t scale_stride = 0;
};

struct QuantizeParams {
  const void* x = nullptr;  // bf16 [*, cols]
  int64_t x_stride = 0;
  const int32_t* rows = nullptr;  // [num_rows] row i of out is row rows[i] / rows_divisor of x; null: row i
  int32_t rows_divisor = 1;
  int32_t num_rows = 0;
  int32_t cols = 0;
  bool is_aligned = false;  // every row of x begins at a multiple of 16 bytes
  QuantizedView out;
  bool is_successor_held = false;  // the next kernel begins once all before this one have ended
  // Exact in two e4m3 parts (quantize.cu): rows 2 i and 2 i + 1 of out.data are row i of x.
  bool is_split = false;
  // More rows, those of another matrix: the shared expert's beside the routed ones'.
  const void* plain_x = nullptr;  // bf16 [num_plain_rows, plain_cols]; null: x and its cols once more
  int64_t plain_x_stride = 0;
  int32_t plain_cols = 0;
  int32_t num_plain_rows = 0;
  QuantizedView plain_out = {};
};
void run_quantize(const QuantizeParams& params, cudaStream_t stream);

constexpr int kWgmmaTokens = 128;  // of one tile
// Scales that are brought for them: a copy begins at a multiple of 16 bytes, which the first token's need not
// be.
constexpr int kWgmmaScales = kWgmmaTokens + 4;

// out = x W^T + bias with x in e4m3, in one of these forms:
// - plain:   x[0], weight[0], outs[0]; where max_rows[1] is not 0, x[1], weight[1], outs[1] too
// - gated:   silu(x weight[0]^T) * (x weight[1]^T), to outs[0] or quantised to out_quantized[0]
// - grouped (map_table[0] set): the tiles of a MoePlan, weights from the tables. Rows of x[0] lie in the
// plan's order;
//            those of outs[0] are order[row of x], those of out_quantized[0] stay in the order of x. The
//            shared expert's have index 1 and are tokens.
struct WgmmaParams {
  TensorMap x[2];        // boxes [kWgmmaTokens, kBlockK]
  TensorMap x_scale[2];  // boxes [1, kWgmmaScales]
  TensorMap maps[2];     // of the weights, boxes [64, kBlockK]
  WeightView weight[2];
  const TensorMap* map_table[2] = {nullptr, nullptr};  // [E + 1]
  const WeightView* table[2] = {nullptr, nullptr};     // [E + 1]
  MoePlan plan;
  LinearIo outs[2];  // bf16; x is not read
  QuantizedView out_quantized[2];
  bool is_gated = false;
  int32_t num_rows = 0;          // of x[0]
  int32_t max_rows[2] = {0, 0};  // [2] N; grouped: of an expert and of the shared one
  int32_t cols[2] = {0, 0};      // [2] K
  int32_t num_shared_tiles = 0;  // grouped: the plan's last ones
  int32_t max_tiles = 0;         // grouped: most of all
  int32_t num_multiprocessors = 0;
};
void run_linear_wgmma(const WgmmaParams& params, cudaStream_t stream);
void prepare_linear_wgmma();

// ---- linear_split.cu ------------------------------------------------------------------------------------

constexpr int kSplitRows = 64;        // weight rows of a unit; gated: half of them gate, half up
constexpr int kSplitScaleMargin = 4;  // scales that are brought besides a tile's, as of kWgmmaScales

// out = x W^T + bias with split inputs and FP8 weights, in one of these forms:
// - plain:   x[0], weight[0], io[0]; where max_rows[1] is not 0, x[1], weight[1], io[1] too
// - gated:   out = silu(x weight[0]^T) * (x weight[1]^T)
// - grouped (map_table[0] set): the tiles of a MoePlan, which is complete before this kernel begins
//            (QuantizeParams::is_successor_held), weights from the tables. Rows of x[0] lie in the plan's
//            order; those of io[0] do where gated, and are order[row of x] elsewhere. The shared expert's
//            have index 1 and are tokens.
struct SplitParams {
  TensorMap x[2];        // boxes [2 tile_tokens, kBlockK] of rows that alternate between high and low parts
  TensorMap x_scale[2];  // boxes [1, tile_tokens + kSplitScaleMargin]
  TensorMap maps[2];     // of the weights, boxes [kSplitRows, kBlockK], gated [kSplitRows / 2, kBlockK]
  WeightView weight[2];
  const TensorMap* map_table[2] = {nullptr, nullptr};  // [E + 1]
  const WeightView* table[2] = {nullptr, nullptr};     // [E + 1]
  MoePlan plan;
  LinearIo io[2];  // out: bf16; x is not read
  bool is_gated = false;
  int32_t num_tokens = 0;        // T
  int32_t tile_tokens = 0;       // 4, 8, 16 or 32: the same in the plan; changes the speed, not a bit
  int32_t max_rows[2] = {0, 0};  // [2] N; grouped: of an expert and of the shared one
  int32_t cols[2] = {0, 0};      // [2] K
  int32_t num_shared_tiles = 0;  // grouped: the plan's last ones
  int32_t max_tiles = 0;         // grouped: most of all
  int32_t num_experts = 0;       // grouped: E
  int32_t num_multiprocessors = 0;
  int32_t num_stages = 0;  // set by run_linear_split
};
void run_linear_split(const SplitParams& params, cudaStream_t stream);
void prepare_linear_split();

// ---- mla_expand.cu, mla_prefill.cu ----------------------------------------------------------------------

// The latents of a step's prefilled sequences, gathered from the cache and quantised, and their rotated keys.
struct MlaGatherParams {
  const void* cache = nullptr;  // [num_slots, cache_stride] bf16, or bytes of FP8 rows
  int64_t cache_stride = 0;
  bool is_cache_fp8 = false;
  const int32_t* slots = nullptr;  // [num_keys]
  int32_t num_keys = 0;
  int32_t lora_rank = 0;
  int32_t rope_dim = 0;
  QuantizedView latents;  // [num_keys, lora_rank]
  void* rope = nullptr;   // bf16 [num_keys, rope_dim]
};
void run_mla_gather(const MlaGatherParams& params, cudaStream_t stream);

constexpr int kPrefillTokens = 128;  // of a tile
constexpr int kPrefillKeys = 128;    // that pass through shared memory together

// Neighbouring tokens of one sequence.
struct PrefillTile {
  int32_t first_token;  // of the step
  int32_t count;
  int32_t first_key;  // row of the sequence's first key among the gathered ones
  int32_t num_keys;   // that the first token attends to; each one after it to one more
};

// out_h = softmax_p(softmax_scale * q_h . [k_nope_h(p) | k_rope(p)]) v_h(p) for `num_heads` heads from
// first_head on.
struct MlaPrefillParams {
  TensorMap q;                         // [T, A * qk_dim], boxes [kPrefillTokens, 64]
  TensorMap kv;                        // [num_keys, num_heads * (nope_dim + v_dim)], boxes [kPrefillKeys, 64]
  TensorMap rope;                      // [num_keys, 64], the same
  const PrefillTile* tiles = nullptr;  // [num_tiles]
  int32_t num_tiles = 0;
  int32_t first_head = 0;
  int32_t num_heads = 0;
  int32_t nope_dim = 0;  // 128 or 64
  int32_t v_dim = 0;     // the same
  float softmax_scale = 0;
  void* out = nullptr;  // bf16 [T, A * v_dim]
  int64_t out_stride = 0;
};
bool has_mla_prefill(int64_t nope_dim, int64_t rope_dim, int64_t v_dim);
void run_mla_prefill(const MlaPrefillParams& params, cudaStream_t stream);
void prepare_mla_prefill();

}  // namespace rodin::cuda
