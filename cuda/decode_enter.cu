// From a layer's normed input to the queries that attention takes, for up to 8 tokens, with the bits of the
// ops that it stands for (linear_pair, rope_store, the linear layer of W_UK):
//   q, kv = x W_q^T, x W_kv^T;  then q_latent = q_nope W_UK, rotation of q and the key, the cache row.
//
// decode_enter_kernel: a block a multiprocessor, 16 warps. First the rows of q and kv_a (decode_rows.cuh),
// then, behind a barrier of all blocks, 12 warps of each multiply with W_UK, 16 rows of one head at a time,
// and the other four rotate and write the cache (rope_store.cuh). Bound by latency: all weights are asked for
// before the kernel ahead has ended.
#include "cuda/decode_rows.cuh"
#include "cuda/mla_latent.cuh"
#include "cuda/rope_store.cuh"

namespace rodin::cuda {
namespace {

constexpr int kLatentWarps = kDecodeRowWarps - kRopeThreads / 32;

template <bool kFp8>
__global__ void __launch_bounds__(kDecodeRowThreads, 1)
    decode_enter_kernel(const __grid_constant__ DecodeEnterParams p) {
  let_successor_begin();
  __shared__ RowScratch scratch;
  const RopeStoreParams& rope = p.enter.rope;
  const int warp = threadIdx.x / 32;
  RowTiles tiles;
  tiles.ask(p.rows, scratch);
  // Blocks one after the other get a warp's rows, so that few rows are spread over all of them.
  const int step = 16 * kLatentWarps * static_cast<int>(gridDim.x);
  int row0 = 16 * static_cast<int>(warp * gridDim.x + blockIdx.x);
  LatentRows latent;
  if (warp < kLatentWarps && row0 < p.enter.w_uk.rows) latent.ask(p.enter.w_uk, row0);
  wait_for_predecessor();
  const GridBarrier barrier(p.arrivals);
  tiles.run(p.rows, rope.num_tokens, scratch);
  barrier.wait();
  if (warp < kLatentWarps) {
    while (row0 < p.enter.w_uk.rows) {
      latent.run(p.enter, row0, true);
      row0 += step;
      if (row0 < p.enter.w_uk.rows) latent.ask(p.enter.w_uk, row0);
    }
  } else {
    const int each = rope_store_blocks(rope.num_heads);
    const auto sync = [] { asm volatile("bar.sync 1, %0;" ::"n"(kRopeThreads) : "memory"); };
    for (int i = gridDim.x - 1 - blockIdx.x; i < rope.num_tokens * each; i += gridDim.x) {
      rope_store_block<kFp8>(rope, i / each, i % each, threadIdx.x - 32 * kLatentWarps, sync);
      sync();  // before the next one writes what this one shares
    }
  }
}

// Blocks of a launch: the norm ahead has a block a token, beside which there is no room.
int num_blocks_of(const DecodeEnterParams& p) {
  const int left = p.num_multiprocessors - p.enter.rope.num_tokens;
  return is_decode_rows(p.rows, left) ? left : p.num_multiprocessors;
}

}  // namespace

bool is_decode_enter(const DecodeEnterParams& p) {
  return is_mla_enter(p.enter) && is_decode_rows(p.rows, p.num_multiprocessors) && p.enter.is_q_aligned &&
         p.enter.rope.nope_dim % 16 == 0 && (p.norm.x == nullptr || is_decode_enter_one(p));
}

void run_decode_enter(const DecodeEnterParams& params, cudaStream_t stream) {
  if (is_decode_enter_one(params)) return run_decode_enter_one(params, stream);
  launch_overlapped(params.enter.rope.is_cache_fp8 ? decode_enter_kernel<true> : decode_enter_kernel<false>,
                    dim3(static_cast<unsigned>(num_blocks_of(params))), kDecodeRowThreads, 0, stream, params,
                    "decode_enter_kernel");
}

}  // namespace rodin::cuda
