// Activations in FP8: for each token and kBlockK channels, scale = largest magnitude / 448 and e4m3 of x /
// scale. quantize_kernel: 16 lanes take one token's block of channels, 8 of them each; grid: (blocks of 8
// tokens, pairs of channel blocks). Bound by bytes: 2 in, 1 out. A NaN makes its whole block NaN.
//
// kSplit, for linear_split: values in two parts (split_values.cuh). An infinity makes its block NaN too.
#include <algorithm>

#include "cuda/quantized.h"
#include "cuda/split_values.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockTokens = kThreads / 16;

template <bool kSplit>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ QuantizeParams p) {
  if (!p.is_successor_held) let_successor_begin();
  wait_for_predecessor();
  if (p.is_successor_held) let_successor_begin();
  const int index = blockIdx.x * kBlockTokens + threadIdx.x / 16;
  const bool is_plain = index >= p.num_rows;
  const int row = is_plain ? index - p.num_rows : index;
  const int lane = threadIdx.x % 16;
  const int col = blockIdx.y * kBlockK + lane * 8;
  const bool is_there = index < p.num_rows + p.num_plain_rows;
  const bool is_other = is_plain && p.plain_x != nullptr;
  const int cols = is_other ? p.plain_cols : p.cols;
  const QuantizedView& view = is_plain ? p.plain_out : p.out;
  if (col >= view.stride) return;
  EightValues own = {};
  float (&values)[8] = own.values;
  if (is_there) {
    const int64_t from = p.rows && !is_plain ? p.rows[row] / p.rows_divisor : row;
    const bf16* x = (is_other ? static_cast<const bf16*>(p.plain_x) + from * p.plain_x_stride
                              : static_cast<const bf16*>(p.x) + from * p.x_stride) +
                    col;
    if (p.is_aligned && col + 8 <= cols) {
      own = EightValues(*reinterpret_cast<const uint4*>(x));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (col + i < cols) values[i] = __bfloat162float(x[i]);
      }
    }
  }
  const float most = largest_of_block(own);
  if (!is_there) return;
  if constexpr (kSplit) {
    const SplitPower power(most);
    uint2 high, low;
    split_eight(values, power.power, high, low);
    uint8_t* const to = static_cast<uint8_t*>(view.data) + 2 * row * view.stride + col;
    *reinterpret_cast<uint2*>(to) = high;
    *reinterpret_cast<uint2*>(to + view.stride) = low;
    if (lane == 0) view.scale[blockIdx.y * view.scale_stride + row] = power.scale;
    return;
  }
  const float inverse = most == 0 ? 0.0f : 448.0f / most;
  uint2 out;
  out.x = quantize_pair(values[0] * inverse, values[1] * inverse) |
          quantize_pair(values[2] * inverse, values[3] * inverse) << 16;
  out.y = quantize_pair(values[4] * inverse, values[5] * inverse) |
          quantize_pair(values[6] * inverse, values[7] * inverse) << 16;
  *reinterpret_cast<uint2*>(static_cast<uint8_t*>(view.data) + row * view.stride + col) = out;
  if (lane == 0) view.scale[blockIdx.y * view.scale_stride + row] = most / 448.0f;
}

}  // namespace

void run_quantize(const QuantizeParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const int64_t channels =
      std::max(params.out.stride, params.num_plain_rows > 0 ? params.plain_out.stride : 0);
  const dim3 grid(static_cast<unsigned>(ceil_div(params.num_rows + params.num_plain_rows, kBlockTokens)),
                  static_cast<unsigned>(channels / kBlockK));
  launch_overlapped(params.is_split ? quantize_kernel<true> : quantize_kernel<false>, grid, kThreads, 0,
                    stream, params, "quantize_kernel");
}

}  // namespace rodin::cuda
