// The way out of a MoE layer in one launch instead of two, with the bits of those: a token's weighted sum
// over its experts (moe.cu), residual += it, the norm (norm.cuh). A block of 256 threads a token.
#include "cuda/norm.cuh"

namespace rodin::cuda {
namespace {

template <int kWords>
__global__ void __launch_bounds__(kNormThreads) moe_norm_kernel(const __grid_constant__ MoeNormParams p) {
  let_successor_begin();
  __shared__ float scratch[kNormThreads / 32];  // [kNormThreads / 32]
  const MoeCombineParams& c = p.combine;
  const NormParams& n = p.norm;
  const int64_t token = blockIdx.x;
  float* residual = static_cast<float*>(const_cast<void*>(n.x)) + token * n.x_stride;
  float4 weight[kWords], value[kWords], sum[kWords] = {};  // [kWords]
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (norm_column(i) < n.cols) weight[i] = load_four(n.weight + norm_column(i));
  }
  wait_for_predecessor();
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (norm_column(i) < n.cols) value[i] = load_four(residual + norm_column(i));
  }
  constexpr int kGroup = kWords <= 2 ? 8 : 2;  // experts whose rows are on their way together
  for (int base = 0; base < c.experts_per_token; base += kGroup) {
    float share[kGroup];         // [kGroup]
    uint2 rows[kGroup][kWords];  // [kGroup, kWords] pairs
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (base + j >= c.experts_per_token) break;
      share[j] = c.expert_weights[token * c.weights_stride + base + j];
      const bf16* row =
          static_cast<const bf16*>(c.routed) + (token * c.experts_per_token + base + j) * c.stride;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (norm_column(i) < n.cols) rows[j][i] = *reinterpret_cast<const uint2*>(row + norm_column(i));
      }
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (base + j >= c.experts_per_token) break;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (norm_column(i) >= n.cols) break;
        const uint2 y = rows[j][i];
        sum[i].x = fmaf(share[j], low_float(y.x), sum[i].x),
        sum[i].y = fmaf(share[j], high_float(y.x), sum[i].y);
        sum[i].z = fmaf(share[j], low_float(y.y), sum[i].z),
        sum[i].w = fmaf(share[j], high_float(y.y), sum[i].w);
      }
    }
  }
  if (c.shared) {
    const bf16* row = static_cast<const bf16*>(c.shared) + token * c.stride;
    float4 added[kWords];  // [kWords]
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (norm_column(i) < n.cols) added[i] = load_four(row + norm_column(i));
    }
    add_words<kWords>(sum, added, n.cols);
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {  // the layer's result is rounded to bf16
    const uint32_t low = pack_bf16(sum[i].x, sum[i].y), high = pack_bf16(sum[i].z, sum[i].w);
    sum[i] = {low_float(low), high_float(low), low_float(high), high_float(high)};
  }
  add_words<kWords>(value, sum, n.cols);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (norm_column(i) < n.cols) *reinterpret_cast<float4*>(residual + norm_column(i)) = value[i];
  }
  store_normed<kWords>(value, weight, inverse_rms(norm_sum<kWords>(value, n.cols, scratch), n.cols, n.eps),
                       n.cols, static_cast<bf16*>(n.out) + token * n.out_stride);
}

}  // namespace

bool is_moe_norm(const MoeNormParams& p) {
  return is_norm_in_registers(p.norm) && p.combine.cols == p.norm.cols && p.combine.stride % 4 == 0;
}

void run_moe_norm(const MoeNormParams& params, cudaStream_t stream) {
  if (params.norm.num_rows == 0) return;
  const int64_t words = ceil_div(params.norm.cols, 4 * kNormThreads);
  launch_overlapped(words <= 2 ? moe_norm_kernel<2> : moe_norm_kernel<kNormMostWords>,
                    dim3(static_cast<unsigned>(params.norm.num_rows)), kNormThreads, 0, stream, params,
                    "moe_norm_kernel");
}

}  // namespace rodin::cuda
