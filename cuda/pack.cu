// Run once after loading: W_UK of every head transposed for the absorbed attention, and FP8 matrices whose
// scale blocks the linear layers do not take widened to bf16.
//
// transpose_heads_kernel: to[h * lora_rank + c][n] = from[h * head_rows + n][c]. Grid: (ceil(lora_rank / 32),
// ceil(padded nope / 32), A), a 32x32 tile through shared memory.
#include "cuda/common.cuh"

namespace rodin::cuda {
namespace {

constexpr int kTile = 32;
constexpr int kTileRows = 8;  // of the block

template <class Element>
__global__ void __launch_bounds__(kTile* kTileRows)
    transpose_heads_kernel(const __grid_constant__ TransposeParams p) {
  __shared__ Element tile[kTile][kTile + 4 / sizeof(Element)];  // [kTile, kTile + padding]
  const int head = blockIdx.z;
  const int c0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile;
  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    const int n = n0 + i, c = c0 + threadIdx.x;
    Element value{};
    if (n < p.nope_dim && c < p.lora_rank) {
      const int64_t row = static_cast<int64_t>(head) * p.head_rows + n;
      value =
          reinterpret_cast<const Element*>(static_cast<const char*>(p.from.data) + row * p.from.row_bytes)[c];
    }
    tile[i][threadIdx.x] = value;
  }
  __syncthreads();
  const int64_t padded = p.to_row_bytes / static_cast<int64_t>(sizeof(Element));
  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    const int c = c0 + i, n = n0 + threadIdx.x;
    if (c >= p.lora_rank || n >= padded) continue;
    const int64_t row = static_cast<int64_t>(head) * p.lora_rank + c;
    reinterpret_cast<Element*>(static_cast<char*>(p.to) + row * p.to_row_bytes)[n] = tile[threadIdx.x][i];
  }
}

// One thread for each scale of the transposed matrix.
__global__ void transpose_scales_kernel(const __grid_constant__ TransposeParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t num_rows = static_cast<int64_t>(p.num_heads) * p.lora_rank / p.to_block_rows;
  if (i >= num_rows * p.to_scale_cols) return;
  const int64_t row = i / p.to_scale_cols * p.to_block_rows;  // h * lora_rank + c
  const int64_t n = i % p.to_scale_cols * kBlockK;
  const int64_t from_row = row / p.lora_rank * p.head_rows + n;
  const int64_t from_col = row % p.lora_rank / kBlockK / p.from.blocks_per_scale;
  p.scale_to[i] = p.from.scale[from_row / p.from.block_rows * p.from.scale_cols + from_col];
}

constexpr int kWidenThreads = 256;

__global__ void __launch_bounds__(kWidenThreads) widen_kernel(const __grid_constant__ WidenParams p) {
  const int64_t row = blockIdx.x;
  const void* from = static_cast<const char*>(p.from.data) + row * p.from.row_bytes;
  const int scale_cols = (p.from.cols + p.block_cols - 1) / p.block_cols;
  const float* scales = p.scale ? p.scale + row / p.block_rows * scale_cols : nullptr;
  bf16* to = reinterpret_cast<bf16*>(static_cast<char*>(p.to) + row * p.to_row_bytes);
  for (int i = threadIdx.x; i < p.to_row_bytes / 2; i += kWidenThreads) {
    float value = 0;
    if (i < p.from.cols) {
      value = element_as_float(from, p.from.dtype, i);
      if (scales) value *= scales[i / p.block_cols];
    }
    to[i] = __float2bfloat16_rn(value);
  }
}

}  // namespace

void run_transpose_heads(const TransposeParams& params, cudaStream_t stream) {
  const int64_t element = dtype_bytes(params.from.dtype);
  const dim3 grid(static_cast<unsigned>(ceil_div(params.lora_rank, kTile)),
                  static_cast<unsigned>(ceil_div(params.to_row_bytes / element, kTile)),
                  static_cast<unsigned>(params.num_heads));
  const dim3 block(kTile, kTileRows);
  if (element == 1) {
    transpose_heads_kernel<uint8_t><<<grid, block, 0, stream>>>(params);
  } else if (element == 2) {
    transpose_heads_kernel<uint16_t><<<grid, block, 0, stream>>>(params);
  } else {
    transpose_heads_kernel<uint32_t><<<grid, block, 0, stream>>>(params);
  }
  RODIN_CHECK_LAUNCH("transpose_heads_kernel");
  if (params.scale_to == nullptr) return;
  const int64_t num_scales =
      static_cast<int64_t>(params.num_heads) * params.lora_rank / params.to_block_rows * params.to_scale_cols;
  transpose_scales_kernel<<<static_cast<unsigned>(ceil_div(num_scales, 256)), 256, 0, stream>>>(params);
  RODIN_CHECK_LAUNCH("transpose_scales_kernel");
}

void run_widen(const WidenParams& params, cudaStream_t stream) {
  if (params.from.rows == 0) return;
  widen_kernel<<<static_cast<unsigned>(params.from.rows), kWidenThreads, 0, stream>>>(params);
  RODIN_CHECK_LAUNCH("widen_kernel");
}

}  // namespace rodin::cuda
