// Chooses kernel and tile sizes for one weight dtype. Which kernel runs changes the speed alone, not a bit of
// the result.
#pragma once

#include "cuda/linear_narrow.cuh"
#include "cuda/linear_wide.cuh"

namespace rodin::cuda {

constexpr int64_t kEnoughWarps = 132 * 16;  // of linear_narrow, to keep enough loads in flight

constexpr int64_t kEnoughWideBlocks = 198;  // one and a half for each multiprocessor

template <class W>
class LinearLauncher {
 public:
  static void run(const LinearParams& p, cudaStream_t stream) {
    const int tile = linear_tile_tokens(p.num_tokens);
    if (tile == kWideTokens && is_wide_enough(p)) {
      p.is_gated ? wide<true>(p, stream) : wide<false>(p, stream);
    } else if (tile == 8) {
      p.is_gated ? narrow<1, 2, true>(p, stream) : narrow<1, 1, false>(p, stream);
    } else if (tile == 16 && W::kParts == 1) {
      p.is_gated ? narrow<2, 2, true>(p, stream) : narrow<2, 1, false>(p, stream);
    } else {
      p.is_gated ? narrow<4, 2, true>(p, stream) : narrow<4, 1, false>(p, stream);
    }
  }

  static void prepare() {
    prepare_narrow<1, 2, true>();
    prepare_narrow<1, 1, false>();
    prepare_narrow<4, 2, true>();
    prepare_narrow<4, 1, false>();
    if constexpr (W::kParts == 1) {
      prepare_narrow<2, 2, true>();
      prepare_narrow<2, 1, false>();
    }
    raise_shared_limit(linear_wide<W, true>, WideStages<W>::kBytes);
    raise_shared_limit(linear_wide<W, false>, WideStages<W>::kBytes);
  }

 private:
  // linear_wide gains by taking many tokens at once what it loses where its blocks do not fill the GPU. The
  // tiles of a MoePlan were cut for it.
  static bool is_wide_enough(const LinearParams& p) {
    const dim3 blocks = grid(p, p.is_gated ? 64 : 128, kWideTokens);
    return p.table[0] != nullptr || int64_t{blocks.x} * blocks.y * blocks.z >= kEnoughWideBlocks;
  }

  // Whether experts' layers of a few tokens go through f16.
  template <int NT>
  static constexpr bool kHasHalf = W::kBytes == 1 && NT == 1;
  static constexpr int kMostHalfBytes = 72 << 10;

  template <int NT, int MT, int KW, bool kGated>
  static void prepare_team() {
    raise_shared_limit(linear_narrow<W, NT, MT, KW, kGated, false>, narrow_shared_bytes<NT, MT, KW>());
    if constexpr (kHasHalf<NT>)
      raise_shared_limit(linear_narrow<W, NT, MT, KW, kGated, true>,
                         narrow_shared_bytes<NT, MT, KW>() + kMostHalfBytes);
  }

  template <int NT, int MT, bool kGated>
  static void prepare_narrow() {
    prepare_team<NT, MT, 8, kGated>();
    if constexpr (W::kParts == 1 && !kGated && NT < 4) prepare_team<NT, MT, 16, kGated>();
    if constexpr (W::kParts == 1) {
      prepare_team<NT, MT, 4, kGated>();
      prepare_team<NT, MT, 2, kGated>();
    }
    if constexpr (kHasHalf<NT>) prepare_team<NT, MT, 1, kGated>();
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
      // Teams as small as keeps the GPU busy: warps that work alone need no barriers.
      const dim3 alone = grid(p, kGated ? 16 : 16 * MT, 8 * NT);
      const int64_t num_tiles = int64_t{alone.x} * alone.y * alone.z;
      const int64_t num_blocks = ceil_div(p.max_cols, kBlockK);
      int team = 1;
      const int most = W::kParts == 1 && !kGated && NT < 4 ? 16 : 8;
      while (team < most && team < num_blocks && num_tiles * team < kEnoughWarps) team *= 2;
      if (W::kParts > 1 && team > 1) team = 8;
      if (team == 16) {
        launch_narrow<NT, MT, 16, kGated>(p, stream);
      } else if (team == 8) {
        launch_narrow<NT, MT, 8, kGated>(p, stream);
      } else if (team == 4) {
        launch_narrow<NT, MT, 4, kGated>(p, stream);
      } else if (team == 2) {
        launch_narrow<NT, MT, 2, kGated>(p, stream);
      } else {
        launch_narrow<NT, MT, 1, kGated>(p, stream);
      }
    }
  }

  template <int NT, int MT, int KW, bool kGated>
  static void launch_narrow(const LinearParams& p, cudaStream_t stream) {
    if constexpr (KW == 16 ? W::kParts == 1 && !kGated && NT < 4 : KW == 1 || KW == 8 || W::kParts == 1) {
      constexpr int kRows = (kGated ? 16 : 16 * MT) * narrow_warps(KW) / KW;
      constexpr int kBytes = narrow_shared_bytes<NT, MT, KW>();
      const dim3 blocks = grid(p, kRows, 8 * NT);
      if constexpr (kHasHalf<NT>) {
        const int bytes = half_shared_bytes(p.tile_tokens, static_cast<int>(ceil_div(p.max_cols, kBlockK)));
        if (p.table[0] != nullptr && bytes <= kMostHalfBytes) {
          return launch_overlapped(linear_narrow<W, NT, MT, KW, kGated, true>, blocks, 32 * narrow_warps(KW),
                                   static_cast<size_t>(kBytes + bytes), stream, p, "linear_narrow");
        }
      }
      launch_overlapped(linear_narrow<W, NT, MT, KW, kGated, false>, blocks, 32 * narrow_warps(KW), kBytes,
                        stream, p, "linear_narrow");
    }
  }

  template <bool kGated>
  static void wide(const LinearParams& p, cudaStream_t stream) {
    launch_overlapped(linear_wide<W, kGated>, grid(p, kGated ? 64 : 128, kWideTokens), kWideThreads,
                      WideStages<W>::kBytes, stream, p, "linear_wide");
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
