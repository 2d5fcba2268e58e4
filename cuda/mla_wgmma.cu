// Absorbed latent attention over the paged cache in bf16 (mla_fp8.cu: in FP8), for latents of 512 and up to
// 64: for each (token, head) row with query q = [q_nope W_UK | q_rope]
//   s_p = softmax_scale * q . latent(p),  o = sum_p softmax(s)_p latent(p)[:512]
// for decode and prefill alike, split over the keys; kernels before and after apply W_UK and W_UV.
//
// Keys are the 64 rows of the products and queries their N = 16, 32 or 64 columns, so that few heads are not
// padded: S^T = K Q^T, then O^T += V^T P^T, where V is read out of the keys' own memory, transposed. The
// tokens of a verify step stand beside one another in N and share one read of the cache.
//
// mla_wgmma_kernel: as many blocks as multiprocessors; each takes (tile, split) items in turn. A block's
// warps:
// - one brings keys in blocks of 64 into a ring of thirds (3 boxes of 64 keys x 64 columns), one thread of
//   another the queries of the item that comes next;
// - warpgroup 0: S^T, then the softmax (base 2): a running maximum that moves when a score exceeds it by
//   2^8, weights to shared memory, and with them by how much earlier sums shrink;
// - warpgroups 1 and 2: O^T of 256 of the 512 columns each. A third is free again once its products are done.
// The next block's scores are computed while this one's values are added up. Nothing of a row's arithmetic
// depends on N, on the tile's other rows or on the items of its block: a row gives the same bits in any
// batch.
//
// Sources of ideas: FlashMLA (roles), FlashAttention-4 (the lazy maximum).
#include <algorithm>

#include "cuda/mla_scores.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 512;

// Of a thread, by warpgroup, where they are not shared out evenly; at a launch there are 128.
template <int N>
struct Registers {
  static constexpr bool kMoves = N == 64;
  static constexpr int kScores = 112;
  static constexpr int kValues = 176;
  static constexpr int kCopies = 48;
  template <int kCount>
  __device__ static void take() {
    if constexpr (kMoves) take_registers<kCount>();
  }
  template <int kCount>
  __device__ static void give() {
    if constexpr (kMoves) give_registers<kCount>();
  }
};

template <int kCount>
__device__ __forceinline__ void pin_all(float (&out)[4][kCount]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pin(out[i]);
}

// Warpgroup 1 + kHalf: columns 256 kHalf .. + 255 of the values, four boxes.
template <int N, int kHalf>
__device__ __forceinline__ void compute_values(const MlaWgmmaParams& p, const MlaLayout<N>& at) {
  using L = MlaLayout<N>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int g = lane / 4, t = lane % 4;
  MlaItems items(p.mla);
  MlaItem item;
  Ring<L::kSlots> ring;
  uint32_t weights_parity = 0;
  float out[4][N / 2];  // [4, N / 2] by box
  // The first of the two thirds that this half has a part in has so many of its boxes, its last ones.
  constexpr int kFirstBoxes = kHalf == 0 ? 2 : 1;
  const uint64_t weights = matrix_descriptor(at.weights());
  while (items.take(item)) {
    for (int first = item.begin; first < item.end; first += kKeys) {
      int slots[kThirds];
#pragma unroll
      for (int third = 0; third < kThirds; ++third) {
        slots[third] = ring.place;
        if (third == kHalf || third == kHalf + 1) barrier_wait(at.full(ring.place), ring.parity);
        ring.next();
      }
      barrier_wait(at.weights_full(), weights_parity);
      weights_parity ^= 1;
      if (lane == 0) barrier_arrive(at.empty(slots[kHalf == 0 ? 2 : 0]));  // no part in it
      const bool is_added = first > item.begin;
      if (is_added) {
        shrink_sums<N>(out, at.shrink());
      }
      pin_all(out);
      products_begin();
      const uint32_t first_at = at.slot(slots[kHalf]) + (kThirdBoxes - kFirstBoxes) * kBoxBytes;
      const uint32_t second_at = at.slot(slots[kHalf + 1]);
#pragma unroll
      for (int box = 0; box < 4; ++box) {
        const uint32_t box_at =
            box < kFirstBoxes ? first_at + box * kBoxBytes : second_at + (box - kFirstBoxes) * kBoxBytes;
        const uint64_t values = transposed_descriptor(box_at, kBoxBytes);
#pragma unroll
        for (int step = 0; step < 4; ++step)
          wgmma_narrow<N, 1>(out[box], values + 128 * step, weights + 2 * step, is_added || step > 0);
        if (box == kFirstBoxes - 1) products_commit();
      }
      products_commit();
      products_wait<1>();
      if (lane == 0) barrier_arrive(at.empty(slots[kHalf]));
      __syncwarp();
      products_wait<0>();
      pin_all(out);
      barrier_arrive(at.weights_empty());
      if (lane == 0) barrier_arrive(at.empty(slots[kHalf + 1]));
      __syncwarp();
    }

    const int64_t row = item.row(p.mla);
    if (is_whole(p.mla)) {
      barrier_wait(at.weights_full(), weights_parity);
      weights_parity ^= 1;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const int column = 8 * (i / 2) + 2 * t + i % 2;
        const float inverse = load_shared_float(at.shrink() + column * 4);
        uint32_t* to = whole_row(p.mla, row + column) + (256 * kHalf + 16 * warp + g - g % 2) / 2;
#pragma unroll
        for (int box = 0; box < 4; ++box) {
          // Lanes g and g + 1 of a pair have columns g and g + 1, and those 8 further: each writes two.
          const float first = out[box][4 * (i / 2) + i % 2] * inverse;
          const float second = out[box][4 * (i / 2) + 2 + i % 2] * inverse;
          const float other = __shfl_xor_sync(kAllLanes, g % 2 == 0 ? second : first, 4);
          if (column < item.tile.num_rows)
            to[32 * box + g % 2 * 4] = g % 2 == 0 ? pack_bf16(first, other) : pack_bf16(other, second);
        }
      }
      barrier_arrive(at.weights_empty());
      continue;
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int column = 8 * (i / 2) + 2 * t + i % 2;
      if (column >= item.tile.num_rows || item.limit(column, p.mla.num_heads) < item.begin) continue;
      float* to = p.mla.partial + ((row + column) * p.mla.max_splits + item.split) * kMlaMaxLora +
                  256 * kHalf + 16 * warp + g;
#pragma unroll
      for (int box = 0; box < 4; ++box) {
        to[64 * box] = out[box][4 * (i / 2) + i % 2];
        to[64 * box + 8] = out[box][4 * (i / 2) + 2 + i % 2];
      }
    }
  }
}

// The same for N = 64: O = P V, weights in registers. Every other box of 64 columns from the kHalf-th on.
template <int kHalf>
__device__ __forceinline__ void compute_wide_values(const MlaWgmmaParams& p, const MlaLayout<64>& at) {
  static_assert(MlaLayout<64>::kSlots % kThirds == 0);  // a block's boxes lie one behind the other
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int g = lane / 4, t = lane % 4;
  MlaItems items(p.mla);
  MlaItem item;
  Ring<MlaLayout<64>::kSlots> ring;
  uint32_t weights_parity = 0;
  const int weights_row = 16 * warp + lane % 16;
  while (items.take(item)) {
    float out[4][32] =
        {};  // [4, 32] rows 16 warp + g and 8 further, columns 8 j + 2 t + c of box 2 i + kHalf
    for (int first = item.begin; first < item.end; first += kKeys) {
      int slots[kThirds];
#pragma unroll
      for (int third = 0; third < kThirds; ++third) {
        slots[third] = ring.place;
        barrier_wait(at.full(ring.place), ring.parity);
        ring.next();
      }
      barrier_wait(at.weights_full(), weights_parity);
      weights_parity ^= 1;
      uint32_t weights[4][4];  // [4, 4] by steps of 16 keys
#pragma unroll
      for (int step = 0; step < 4; ++step)
        load_matrix_x4(weights[step], at.weights() + weights_row * 128 +
                                          (((2 * step + lane / 16) ^ (weights_row & 7)) * 16));
      const float shrink[2] = {load_shared_float(at.shrink() + (16 * warp + g) * 4),
                               load_shared_float(at.shrink() + (16 * warp + g + 8) * 4)};
      barrier_arrive(at.weights_empty());
      if (__any_sync(kAllLanes, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 32; ++j) out[i][j] *= shrink[j / 2 % 2];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) pin(out[i]);
      products_begin();
      const uint32_t values_at = at.slot(slots[0]) + (1 + kHalf) * kBoxBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t values = transposed_descriptor(values_at + 2 * i * kBoxBytes, kBoxBytes);
#pragma unroll
        for (int step = 0; step < 4; ++step)
          wgmma_m64n64k16_bf16_transposed(out[i], weights[step], values + 128 * step);
        products_commit();
      }
      products_wait<3>();
      if (lane == 0) barrier_arrive(at.empty(slots[0]));
      products_wait<kHalf == 0 ? 1 : 2>();
      if (lane == 0) barrier_arrive(at.empty(slots[1]));
      products_wait<0>();
#pragma unroll
      for (int i = 0; i < 4; ++i) pin(out[i]);
      if (lane == 0) barrier_arrive(at.empty(slots[2]));
      __syncwarp();
    }
    if (is_whole(p.mla)) {
      barrier_wait(at.weights_full(), weights_parity);
      weights_parity ^= 1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * warp + g + 8 * half;
        if (row >= item.tile.num_rows) continue;
        const float inverse = load_shared_float(at.shrink() + row * 4);
        uint32_t* to = whole_row(p.mla, item.row(p.mla) + row) + 32 * kHalf + t;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            to[64 * i + 4 * j] =
                pack_bf16(out[i][4 * j + 2 * half] * inverse, out[i][4 * j + 2 * half + 1] * inverse);
      }
      barrier_arrive(at.weights_empty());
      continue;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * warp + g + 8 * half;
      if (row >= item.tile.num_rows || item.limit(row, p.mla.num_heads) < item.begin) continue;
      float* to = p.mla.partial + ((item.row(p.mla) + row) * p.mla.max_splits + item.split) * kMlaMaxLora +
                  64 * kHalf + 2 * t;
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          *reinterpret_cast<float2*>(to + 128 * i + 8 * j) =
              make_float2(out[i][4 * j + 2 * half], out[i][4 * j + 2 * half + 1]);
    }
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads, 1) mla_wgmma_kernel(const __grid_constant__ MlaWgmmaParams p) {
  using L = MlaLayout<N>;
  extern __shared__ __align__(1024) char shared[];
  L at;
  at.base = shared_address(shared);
  let_successor_begin();
  if (threadIdx.x == 0) {
    if (at.base % 1024 != 0) __trap();  // swizzled boxes
    for (int i = 0; i < L::kSlots; ++i) {
      barrier_init(at.full(i), 1);
      barrier_init(at.empty(i), 8);
    }
    init_barriers(p, at);
    prefetch_map(&p.cache);
  }
  __syncthreads();
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
  using R = Registers<N>;
  if (group == 0) {
    R::template give<R::kScores>();
    if constexpr (N == 64) {
      compute_wide_scores(p, at);
    } else {
      compute_scores(p, at);
    }
  } else if (group == 1) {
    R::template take<R::kValues>();
    if constexpr (N == 64) {
      compute_wide_values<0>(p, at);
    } else {
      compute_values<N, 0>(p, at);
    }
  } else if (group == 2) {
    R::template take<R::kValues>();
    if constexpr (N == 64) {
      compute_wide_values<1>(p, at);
    } else {
      compute_values<N, 1>(p, at);
    }
  } else {
    R::template give<R::kCopies>();
    if (warp == 0) bring_keys(p, at);
    if (warp == 1 && threadIdx.x % 32 == 0) bring_queries(p, at);
  }
}

template <int N>
void launch(const MlaWgmmaParams& p, cudaStream_t stream) {
  const int blocks = std::min(p.mla.num_tiles * p.mla.max_splits, p.num_multiprocessors);
  launch_overlapped(mla_wgmma_kernel<N>, dim3(static_cast<unsigned>(blocks)), kThreads, MlaLayout<N>::kBytes,
                    stream, p, "mla_wgmma_kernel");
}

void launch_tiles(const MlaWgmmaParams& p, cudaStream_t stream) {
  if (p.mla.tile_rows == 16) {
    launch<16>(p, stream);
  } else if (p.mla.tile_rows == 32) {
    launch<32>(p, stream);
  } else {
    launch<64>(p, stream);
  }
}

}  // namespace

bool has_mla_wgmma(int64_t nope_dim, int64_t rope_dim, int64_t lora_rank, int64_t block_size,
                   bool is_cache_fp8) {
  return lora_rank == kMlaMaxLora && rope_dim > 0 && rope_dim <= kMlaBoxColumns && rope_dim % 8 == 0 &&
         nope_dim % 8 == 0 && (is_cache_fp8 || block_size % 8 == 0);
}

void run_mla_wgmma(const MlaWgmmaParams& params, cudaStream_t stream) {
  if (params.mla.num_tiles == 0) return;
  params.mla.is_cache_fp8 ? run_mla_fp8(params, stream) : launch_tiles(params, stream);
}

void prepare_mla_wgmma() {
  raise_shared_limit(mla_wgmma_kernel<16>, MlaLayout<16>::kBytes);
  raise_shared_limit(mla_wgmma_kernel<32>, MlaLayout<32>::kBytes);
  raise_shared_limit(mla_wgmma_kernel<64>, MlaLayout<64>::kBytes);
  prepare_mla_fp8();
}

}  // namespace rodin::cuda
