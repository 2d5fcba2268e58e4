// Params and launcher of latent attention on wgmma (mla_wgmma.cu).
#pragma once

#include "cuda/quantized.h"

namespace rodin::cuda {

// Columns of the latent that the kernel takes, and those of the rotary part at most.
constexpr int kMlaBoxColumns = 64;

struct MlaWgmmaParams {
  MlaParams mla;
  TensorMap cache;         // bf16 [num_slots, lora_rank + rope_dim], boxes [piece_rows, 64]; not with FP8
  TensorMap q_latent;      // bf16 [chunk tokens * A, lora_rank], boxes [tile_rows, 64]
  TensorMap q_rope;        // bf16 [T * A, rope_dim], the same
  int32_t piece_rows = 0;  // neighbouring slots: what divides both a block and kMlaKeyBlock
  int32_t num_multiprocessors = 0;
};

// An MlaTile has 16, 32 or 64 rows, with an FP8 cache 16 or 32.
constexpr int kMlaMostTileRows = 64;
constexpr int kMlaMostTileRowsFp8 = 32;

// Whether a model's attention is computed by this kernel; mla.cu takes every other.
bool has_mla_wgmma(int64_t nope_dim, int64_t rope_dim, int64_t lora_rank, int64_t block_size,
                   bool is_cache_fp8);
void run_mla_wgmma(const MlaWgmmaParams& params, cudaStream_t stream);
void prepare_mla_wgmma();
// The part of it that has an FP8 cache (mla_fp8.cu).
void run_mla_fp8(const MlaWgmmaParams& params, cudaStream_t stream);
void prepare_mla_fp8();

}  // namespace rodin::cuda
