// Params and launchers of the kernels for many tokens: as kernels.h, with its letters.
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
};
void run_quantize(const QuantizeParams& params, cudaStream_t stream);

constexpr int kWgmmaTokens = 128;  // of one tile

// out = x W^T + bias with x in e4m3, in one of these forms:
// - plain:   weight[0], outs[0]; is_pair: and weight[1], outs[1] of the same x and K
// - gated:   silu(x weight[0]^T) * (x weight[1]^T), to outs[0] or quantised to out_quantized
// - grouped (plan.tiles set): the tiles of a MoePlan over rows of x that lie in its order, weights from the
// tables.
//            Rows of outs[0] are out_rows[row of x]; those of out_quantized stay in the order of x.
struct WgmmaParams {
  TensorMap x;        // boxes [kWgmmaTokens, kBlockK]
  TensorMap x_scale;  // boxes [1, kWgmmaTokens]
  TensorMap maps[2];  // of the weights, boxes [64, kBlockK]
  WeightView weight[2];
  const TensorMap* map_table[2] = {nullptr, nullptr};  // [E]
  const WeightView* table[2] = {nullptr, nullptr};     // [E]
  MoePlan plan;
  LinearIo outs[2];  // bf16; x is not read
  const int32_t* out_rows = nullptr;
  QuantizedView out_quantized;
  bool is_gated = false;
  bool is_pair = false;
  int32_t num_rows = 0;   // of x
  int32_t max_rows = 0;   // grouped: N of an expert
  int32_t max_tiles = 0;  // grouped: most tiles of the plan
  int32_t cols = 0;       // K
  int32_t num_multiprocessors = 0;
};
void run_linear_wgmma(const WgmmaParams& params, cudaStream_t stream);
void prepare_linear_wgmma();

}  // namespace rodin::cuda
