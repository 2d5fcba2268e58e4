// Activations in FP8: for each token and kBlockK channels, scale = largest magnitude / 448 and e4m3 of x /
// scale. quantize_kernel: 16 lanes take one token's block of channels, 8 of them each; grid: (blocks of 8
// tokens, pairs of channel blocks). Bound by bytes: 2 in, 1 out. A NaN makes its whole block NaN.
#include "cuda/common.cuh"
#include "cuda/quantized.h"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockTokens = kThreads / 16;

__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ QuantizeParams p) {
  let_successor_begin();
  wait_for_predecessor();
  const int index = blockIdx.x * kBlockTokens + threadIdx.x / 16;
  const bool is_plain = index >= p.num_rows;
  const int row = is_plain ? index - p.num_rows : index;
  const int lane = threadIdx.x % 16;
  const int col = blockIdx.y * kBlockK + lane * 8;
  const bool is_there = index < p.num_rows + p.num_plain_rows;
  float values[8] = {};  // [8]
  if (is_there) {
    const int64_t from = p.rows && !is_plain ? p.rows[row] / p.rows_divisor : row;
    const bf16* x = static_cast<const bf16*>(p.x) + from * p.x_stride + col;
    if (p.is_aligned && col + 8 <= p.cols) {
      const uint4 words = *reinterpret_cast<const uint4*>(x);
      values[0] = low_float(words.x), values[1] = high_float(words.x);
      values[2] = low_float(words.y), values[3] = high_float(words.y);
      values[4] = low_float(words.z), values[5] = high_float(words.z);
      values[6] = low_float(words.w), values[7] = high_float(words.w);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (col + i < p.cols) values[i] = __bfloat162float(x[i]);
      }
    }
  }
  float most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = max_or_nan(most, fabsf(values[i]));
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2)
    most = max_or_nan(most, __shfl_xor_sync(kAllLanes, most, offset));
  if (!is_there) return;
  const float inverse = most == 0 ? 0.0f : 448.0f / most;
  uint2 out;
  out.x = quantize_pair(values[0] * inverse, values[1] * inverse) |
          quantize_pair(values[2] * inverse, values[3] * inverse) << 16;
  out.y = quantize_pair(values[4] * inverse, values[5] * inverse) |
          quantize_pair(values[6] * inverse, values[7] * inverse) << 16;
  const QuantizedView& view = is_plain ? p.plain_out : p.out;
  *reinterpret_cast<uint2*>(static_cast<uint8_t*>(view.data) + row * view.stride + col) = out;
  if (lane == 0) view.scale[blockIdx.y * view.scale_stride + row] = most / 448.0f;
}

}  // namespace

void run_quantize(const QuantizeParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.num_rows + params.num_plain_rows, kBlockTokens)),
                  static_cast<unsigned>(params.out.stride / kBlockK));
  launch_overlapped(quantize_kernel, grid, kThreads, 0, stream, params, "quantize_kernel");
}

}  // namespace rodin::cuda
