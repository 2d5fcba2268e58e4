// Chooses kernel and tile sizes for one weight dtype. Which kernel runs changes the speed alone, not a bit of
// the result.
#pragma once

#include "cuda/linear_narrow.cuh"
#include "cuda/linear_wide.cuh"

namespace rodin::cuda {

constexpr int64_t kEnoughBlocks = 528;  // four for each of 132 multiprocessors

template <class W>
class LinearLauncher {
 public:
  static void run(const LinearParams& p, cudaStream_t stream) {
    const int tile = linear_tile_tokens(p.num_tokens);
    if (tile == kWideTokens) {
      p.is_gated ? wide<true>(p, stream) : wide<false>(p, stream);
    } else if (tile == 8) {
      p.is_gated ? narrow<1, 2, true>(p, stream) : narrow<1, 1, false>(p, stream);
    } else if (tile == 16 && W::kParts == 1) {
      p.is_gated ? narrow<2, 2, true>(p, stream) : narrow<2, 1, false>(p, stream);
    } else {
      p.is_gated ? narrow<4, 2, true>(p, stream) : narrow<4, 2, false>(p, stream);
    }
  }

  static void prepare() {
    prepare_narrow<1, 2, true>();
    prepare_narrow<1, 1, false>();
    prepare_narrow<4, 2, true>();
    prepare_narrow<4, 2, false>();
    if constexpr (W::kParts == 1) {
      prepare_narrow<2, 2, true>();
      prepare_narrow<2, 1, false>();
    }
    raise_limit(linear_wide<W, true>, kWideSharedBytes);
    raise_limit(linear_wide<W, false>, kWideSharedBytes);
  }

 private:
  template <class Kernel>
  static void raise_limit(Kernel* kernel, int bytes) {
    RODIN_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), " to ", bytes);
  }

  template <int NT, int MT, bool kGated>
  static void prepare_narrow() {
    raise_limit(linear_narrow<W, NT, MT, 8, kGated>, narrow_shared_bytes<NT, MT, 8>());
  }

  static dim3 grid(const LinearParams& p, int rows_per_block, int tile_tokens) {
    dim3 size;
    size.x = static_cast<unsigned>(ceil_div(p.max_rows, rows_per_block));
    size.y = p.table[0] ? static_cast<unsigned>(p.max_tiles)
                        : static_cast<unsigned>(ceil_div(p.num_tokens, tile_tokens));
    size.z = p.is_pair ? 2u : static_cast<unsigned>(p.num_batches);
    return size;
  }

  template <int NT, int MT, bool kGated>
  static void narrow(const LinearParams& p, cudaStream_t stream) {
    if constexpr (NT != 2 || W::kParts == 1) {
      constexpr int kRows = kGated ? 16 : 16 * MT;
      constexpr int kThreads = 32 * kNarrowWarps;
      // Warps that work alone need no barriers; teams are for shapes with too few rows to fill the GPU.
      const dim3 alone = grid(p, kRows * kNarrowWarps, 8 * NT);
      if (p.max_cols <= kBlockK || int64_t{alone.x} * alone.y * alone.z >= kEnoughBlocks) {
        linear_narrow<W, NT, MT, 1, kGated><<<alone, kThreads, 0, stream>>>(p);
      } else {
        linear_narrow<W, NT, MT, 8, kGated>
            <<<grid(p, kRows, 8 * NT), kThreads, narrow_shared_bytes<NT, MT, 8>(), stream>>>(p);
      }
      RODIN_CHECK_LAUNCH("linear_narrow");
    }
  }

  template <bool kGated>
  static void wide(const LinearParams& p, cudaStream_t stream) {
    linear_wide<W, kGated>
        <<<grid(p, kGated ? 64 : 128, kWideTokens), kWideThreads, kWideSharedBytes, stream>>>(p);
    RODIN_CHECK_LAUNCH("linear_wide");
  }
};

void run_linear_fp8(const LinearParams& params, cudaStream_t stream);
void run_linear_bf16(const LinearParams& params, cudaStream_t stream);
void run_linear_f16(const LinearParams& params, cudaStream_t stream);
void run_linear_f32(const LinearParams& params, cudaStream_t stream);
void prepare_linear_fp8();
void prepare_linear_bf16();
void prepare_linear_f16();
void prepare_linear_f32();

}  // namespace rodin::cuda
