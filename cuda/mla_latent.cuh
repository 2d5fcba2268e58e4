// q_latent = q_nope W_UK for a few tokens, 16 rows a warp.
#pragma once

#include "cuda/weight_block.cuh"

namespace rodin::cuda {

// 16 rows of W_UK, which are of one head.
struct LatentRows {
  WeightBlock weights;
  float scale[2];  // [row half]

  __device__ __forceinline__ void ask(const WeightView& w_uk, int row0) {
    const int g = threadIdx.x % 32 / 4;
    weights.load(w_uk, 0, row0, w_uk.rows, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      scale[half] = scale_at(scale_row(w_uk, 0, row0 + g + 8 * half, w_uk.rows), 0, 1);
  }
  // `is_q_aligned`: the params', or true where it is known to be.
  __device__ __forceinline__ void run(const MlaEnterParams& p, int row0, bool is_q_aligned) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int head = row0 / p.rope.lora_rank, column0 = row0 % p.rope.lora_rank;
    const bf16* q =
        static_cast<const bf16*>(p.rope.q) + g * p.rope.q_stride + head * (p.rope.nope_dim + p.rope.rope_dim);
    uint32_t x[2][8];  // [K half, 8]
    load_block_inputs(x, g < p.rope.num_tokens ? q : nullptr, 0, p.rope.nope_dim, is_q_aligned);
    float acc[4] = {};
    weights.multiply(x, acc);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int token = 2 * t + c % 2;
      if (token >= p.rope.num_tokens) continue;
      bf16* to = static_cast<bf16*>(p.q_latent) +
                 (static_cast<int64_t>(token) * p.rope.num_heads + head) * p.q_latent_stride;
      to[column0 + g + 8 * (c / 2)] = __float2bfloat16_rn(add_block<WeightF8>(0.0f, acc[c], scale[c / 2]));
    }
  }
};

}  // namespace rodin::cuda
