// The part of kernels.h that attention takes, and the view of a weight that all of it shares.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/tensor.h"

namespace rodin::cuda {

// K is cut into blocks of this many inputs; products are summed within a block by the tensor cores and the
// blocks' sums are added in rising order in float32 (times their scale). The same for every kernel and every
// number of tokens: this is what makes a row's result independent of the batch.
constexpr int kBlockK = 128;

// A weight matrix in device memory. Rows are padded with zeros to a multiple of 16 elements.
struct WeightView {
  const void* data = nullptr;    // [rows, row_bytes]
  const float* scale = nullptr;  // [ceil(rows / block_rows), scale_cols]; FP8 only
  const float* bias = nullptr;   // [rows] or null
  int64_t row_bytes = 0;
  int32_t rows = 0;              // N
  int32_t cols = 0;              // K
  int32_t block_rows = 1;        // rows that share a scale
  int32_t blocks_per_scale = 1;  // blocks of kBlockK inputs that share a scale
  int32_t scale_cols = 0;
  Dtype dtype = Dtype::kBF16;
};

// ---- rope_cache.cu --------------------------------------------------------------------------------------

struct RopeTableParams {
  const int32_t* positions = nullptr;  // [T]
  const float* inv_freq = nullptr;     // [half]
  float multiplier = 1;
  float* table = nullptr;  // [T, stride] cos of `half` angles, then sin
  int64_t stride = 0;
  int32_t num_tokens = 0;
  int32_t half = 0;
};
void run_rope_table(const RopeTableParams& params, cudaStream_t stream);

struct RopeStoreParams {
  void* q = nullptr;  // bf16 [T, A * qk_dim], rope parts rotated in place
  int64_t q_stride = 0;
  const void* kv = nullptr;  // bf16 [T, lora_rank + rope_dim]
  int64_t kv_stride = 0;
  const float* norm_weight = nullptr;  // [lora_rank]
  float eps = 0;
  const float* rope_table = nullptr;  // [T, rope_stride]
  int64_t rope_stride = 0;
  const int32_t* slots = nullptr;  // [T]
  void* cache = nullptr;           // [num_slots, cache_stride] bf16, or bytes of FP8 rows
  int64_t cache_stride = 0;
  int32_t num_tokens = 0;
  int32_t num_heads = 0;
  int32_t nope_dim = 0;
  int32_t rope_dim = 0;
  int32_t lora_rank = 0;
  bool is_interleaved = true;
  bool is_cache_fp8 = false;
};
void run_rope_store(const RopeStoreParams& params, cudaStream_t stream);

// ---- mla.cu, mla_wgmma.cu (mla_wgmma.h) -------------------------------------------------------------------

constexpr int kMlaKeyBlock = 64;
constexpr int kMlaMaxLatent = 576;  // lora_rank + rope_dim, rounded up to 64
constexpr int kMlaMaxLora = 512;

// A row of an FP8 cache (ops.h, CacheLayer) in bytes: e4m3 latents, a float32 scale for each kFp8Group of
// them, the rotary part in bf16. lora_rank is 512 and rope_dim a multiple of 8, so that all parts are whole
// 16-byte words.
constexpr int kFp8Group = 128;

// Consecutive (token, head) rows of one sequence that are worked on together: rows row_begin .. + num_rows -
// 1 of the flattened [q_len, A]. All of them have the same split size.
struct MlaTile {
  int32_t seq;
  int32_t row_begin;
  int32_t num_rows;
  int32_t max_position;  // cache position of the last row's token
  int32_t split_shift;   // keys of one split = 1 << split_shift
  // Of the sequence: its first token in the step, that one's cache position, its place in the block tables.
  int32_t first_token;
  int32_t first_position;
  int32_t table_start;
};

// Keys of one split for a query at cache position p: a function of p and of the step's spread, so that in
// steps of one spread a row is always summed in the same order. With spread 0 four to eight splits up to 8192
// keys, then splits of 1024; each step of spread halves them, not below a block of keys, and not behind
// kMlaSpreadEnd.
constexpr int kMlaSpreadEnd = 16384;
__host__ __device__ inline int mla_split_shift(int32_t position, int spread) {
  const int shift = position < 1024 ? 7 : position < 2048 ? 8 : position < 4096 ? 9 : 10;
  if (spread > 0 && position >= kMlaSpreadEnd) return shift;
  return shift - spread < 6 ? 6 : shift - spread;
}
inline int32_t mla_num_splits(int32_t position, int spread) {
  return (position >> mla_split_shift(position, spread)) + 1;
}

struct MlaParams {
  const void* q_latent = nullptr;  // bf16 [chunk tokens, A, q_latent_stride] q_nope W_UK
  int64_t q_latent_stride = 0;
  const void* q = nullptr;  // bf16 [T, A * qk_dim]; only the rope parts are read
  int64_t q_stride = 0;
  const void* cache = nullptr;  // [num_slots, cache_stride] bf16, or bytes of FP8 rows
  int64_t cache_stride = 0;
  bool is_cache_fp8 = false;
  const int32_t* q_start = nullptr;            // [S + 1]
  const int32_t* cache_positions = nullptr;    // [T]
  const int32_t* block_table_start = nullptr;  // [S + 1]
  const int32_t* block_table = nullptr;
  const MlaTile* tiles = nullptr;  // [num_tiles]
  int32_t num_tiles = 0;
  int32_t max_splits = 0;   // of this chunk
  int32_t first_token = 0;  // of this chunk
  int32_t num_tokens = 0;   // of this chunk
  int32_t first_position = 0;
  int32_t block_size = 0;
  int32_t num_heads = 0;
  int32_t nope_dim = 0;
  int32_t rope_dim = 0;
  int32_t lora_rank = 0;
  int32_t tile_rows = 16;  // most rows of an MlaTile
  int32_t spread = 0;      // of the splits
  float softmax_scale = 0;
  float* partial = nullptr;     // [chunk tokens * A, max_splits, lora_rank] not normalised
  float* partial_ml = nullptr;  // [chunk tokens * A, max_splits, 2] running maximum (base 2) and sum
  void* out = nullptr;          // bf16 [chunk tokens, A, out_stride] latents
  int64_t out_stride = 0;
};
void run_mla_attention(const MlaParams& params, cudaStream_t stream);
void run_mla_combine(const MlaParams& params, cudaStream_t stream);
void prepare_mla();

// ---- mla_heads.cu: few tokens -----------------------------------------------------------------------------

constexpr int kMlaFewTokens = 8;

// rope_store and q_latent = q_nope W_UK in one launch.
struct MlaEnterParams {
  RopeStoreParams rope;
  WeightView w_uk;           // [A * lora_rank, nope_dim]
  void* q_latent = nullptr;  // bf16 [T, A, q_latent_stride]
  int64_t q_latent_stride = 0;
  bool is_q_aligned = false;  // every head of q begins at a multiple of 16 bytes
};
// Whether the kernel takes these; the same for the next.
bool is_mla_enter(const MlaEnterParams& params);
void run_mla_enter(const MlaEnterParams& params, cudaStream_t stream);

// mla_combine and out = latents W_UV in one launch.
struct MlaLeaveParams {
  MlaParams mla;
  WeightView w_uv;  // kv_b: v_dim rows of head h from h * weight_batch + weight_offset on
  int64_t weight_batch = 0;
  int64_t weight_offset = 0;
  int32_t v_dim = 0;
  void* out = nullptr;  // bf16 [chunk tokens, out_stride]
  int64_t out_stride = 0;
};
bool is_mla_leave(const MlaLeaveParams& params);
void run_mla_leave(const MlaLeaveParams& params, cudaStream_t stream);

// ---- gqa.cu ---------------------------------------------------------------------------------------------

constexpr int kGqaMaxHeadDim = 256;

struct GqaParams {
  void* q = nullptr;  // bf16 [T, A * D]; run_gqa_store rotates it
  int64_t q_stride = 0;
  void* kv = nullptr;  // bf16 [T, 2 * G * D]; run_gqa_store alone, which rotates the keys
  int64_t kv_stride = 0;
  const float* rope_table = nullptr;  // [T, rope_stride]; run_gqa_store alone
  int64_t rope_stride = 0;
  void* cache = nullptr;  // bf16 [num_slots, cache_stride]
  int64_t cache_stride = 0;
  const int32_t* slots = nullptr;              // [T]
  const int32_t* seq_of_token = nullptr;       // [T]
  const int32_t* cache_positions = nullptr;    // [T]
  const int32_t* block_table_start = nullptr;  // [S + 1]
  const int32_t* block_table = nullptr;
  int32_t num_tokens = 0;
  int32_t num_heads = 0;     // A
  int32_t num_kv_heads = 0;  // G
  int32_t head_dim = 0;      // D
  int32_t first_position = 0;
  int32_t block_size = 0;
  float softmax_scale = 0;
  void* out = nullptr;  // bf16 [T, A * D]; run_gqa_attention alone
  int64_t out_stride = 0;
};
void run_gqa_store(const GqaParams& params, cudaStream_t stream);
void run_gqa_attention(const GqaParams& params, cudaStream_t stream);

}  // namespace rodin::cuda
