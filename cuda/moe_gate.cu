// The way into a MoE layer for few tokens in one launch instead of three, with the bits of those: residual +=
// delta and its norm (norm.cuh), the router (linear_narrow: blocks of inputs summed apart and added in rising
// order) and the choice of experts (route.cuh).
//
// moe_gate_kernel: grid (E / 16, T), 8 warps. Every block norms the token's row for itself and makes 16
// logits; the one that is done last writes residual and norm, which the others have read by then, and
// chooses. Bound by latency: the router's weights are on their way before the kernel ahead has ended.
#include "cuda/linear_tile.cuh"
#include "cuda/norm.cuh"
#include "cuda/route.cuh"

namespace rodin::cuda {
namespace {

constexpr int kWarps = kNormThreads / 32;
constexpr int kMostBlocks =
    kNormMostWords * 4 * kNormThreads / kBlockK;  // blocks of inputs of the longest row

template <int kWords>
__global__ void __launch_bounds__(kNormThreads) moe_gate_kernel(const __grid_constant__ MoeGateParams p) {
  constexpr int kInputs = kWords * 4 * kNormThreads;
  let_successor_begin();
  __shared__ __align__(16) bf16 normed[kInputs];  // [kInputs]
  __shared__ float sums[kMostBlocks][16];         // [kMostBlocks, 16] of a block of inputs, by expert
  __shared__ float scratch[kWarps];               // [kWarps]
  __shared__ bool is_last;
  extern __shared__ float route_shared[];  // [route_scratch] where experts are in groups
  const NormParams& n = p.norm;
  const int64_t token = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int row0 = blockIdx.x * 16;
  const int num_blocks = (n.cols + kBlockK - 1) / kBlockK;

  // Weights of this warp's blocks warp, warp + kWarps, ..: the first two before the norm.
  WeightBF16::Fragment weights[2][2][2];  // [2, row half, K half]
  const auto load = [&](int block, WeightBF16::Fragment(&to)[2][2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int kh = 0; kh < 2; ++kh)
        load_fragment<WeightBF16>(to[half][kh], weight_row(p.router, 0, row0 + g + 8 * half, p.router.rows),
                                  block * kBlockK + 64 * kh + 16 * t, n.cols);
  };
  load(warp, weights[0]);
  load(warp + kWarps, weights[1]);
  float4 weight[kWords], value[kWords], added[kWords];  // [kWords]
  float* residual = static_cast<float*>(const_cast<void*>(n.x)) + token * n.x_stride;
  const bf16* delta = static_cast<const bf16*>(n.delta) + token * n.delta_stride;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (norm_column(i) < n.cols) weight[i] = load_four(n.weight + norm_column(i));
  }
  wait_for_predecessor();
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (norm_column(i) >= n.cols) break;
    value[i] = load_four(residual + norm_column(i));
    added[i] = load_four(delta + norm_column(i));
  }
  add_words<kWords>(value, added, n.cols);
  const float inverse = inverse_rms(norm_sum<kWords>(value, n.cols, scratch), n.cols, n.eps);
  store_normed<kWords>(value, weight, inverse, n.cols, normed);
  __syncthreads();

  for (int i = 0; warp + i * kWarps < num_blocks; i += 2) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int block = warp + (i + j) * kWarps;
      float acc[4] = {};
#pragma unroll
      for (int kh = 0; kh < 2; ++kh) {
        uint32_t x[8];  // [8] the token is column 0
        load_inputs(x, g == 0 ? normed : nullptr, block * kBlockK + 64 * kh + 16 * t, n.cols, true);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          uint32_t a[4];
          WeightBF16::pairs(weights[j][0][kh], step, 0, a[0], a[2]);
          WeightBF16::pairs(weights[j][1][kh], step, 0, a[1], a[3]);
          mma(acc, a, x[2 * step], x[2 * step + 1]);
        }
      }
      if (t == 0 && block < num_blocks) sums[block][g] = acc[0], sums[block][g + 8] = acc[2];
      load(block + 2 * kWarps, weights[j]);
    }
  }
  __syncthreads();
  const int expert = row0 + static_cast<int>(threadIdx.x);
  if (threadIdx.x < 16 && expert < p.router.rows) {
    float total = 0;
    for (int block = 0; block < num_blocks; ++block)
      total = add_block<WeightBF16>(total, sums[block][threadIdx.x], 1.0f);
    p.logits[token * p.router.rows + expert] = total;
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.done + token, 1) + 1 == gridDim.x;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) p.done[token] = 0;
  if (warp == 0) {
    if (is_route_ungrouped(p.route.route)) {
      route_ungrouped(p.route, token, [] {});
    } else {
      route_grouped(p.route, token, route_shared);
    }
  }
  bf16* out = static_cast<bf16*>(n.out) + token * n.out_stride;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (norm_column(i) < n.cols) *reinterpret_cast<float4*>(residual + norm_column(i)) = value[i];
  }
  store_normed<kWords>(value, weight, inverse, n.cols, out);
}

}  // namespace

bool is_moe_gate(const MoeGateParams& p) {
  return p.norm.num_rows <= kGateFewTokens && p.norm.num_rows > 0 && p.router.dtype == Dtype::kBF16 &&
         p.router.bias == nullptr && p.norm.cols % 16 == 0 && p.router.cols == p.norm.cols &&
         is_norm_in_registers(p.norm) && route_scratch(p.route.route) * 4 <= (16 << 10);
}

void run_moe_gate(const MoeGateParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.router.rows, 16)),
                  static_cast<unsigned>(params.norm.num_rows));
  const int64_t words = ceil_div(params.norm.cols, 4 * kNormThreads);
  const auto bytes =
      static_cast<size_t>(is_route_ungrouped(params.route.route) ? 0 : route_scratch(params.route.route) * 4);
  launch_overlapped(words <= 2 ? moe_gate_kernel<2> : moe_gate_kernel<kNormMostWords>, grid, kNormThreads,
                    bytes, stream, params, "moe_gate_kernel");
}

}  // namespace rodin::cuda
