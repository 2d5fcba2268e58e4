// Absorbed latent attention over an FP8 cache: what mla_wgmma.cu does for bf16, with the keys' e4m3 codes as
// the 64 rows of products in f16, which holds them exactly, and their scales taken out:
//   s_p = q_rope . rope(p) + sum_g scale_g(p) * q_g . codes_g(p)       g: groups of 128 latents
//   o_g = sum_p codes_g(p) (w_p scale_g(p))                            w: weights of the softmax
// so that a word of four codes takes two conversions and no product. The weights times scales are f16 with
// a range that the running maximum keeps: it is one of s_p + log2 of the key's largest scale, so that no
// weight times scale exceeds 2^8. They are 2^7 larger in memory.
//
// mla_fp8_kernel: as many blocks as multiprocessors; each takes (tile, split) items in turn. A block's warps:
// - one brings raw rows in stages of 64 keys, one thread of another the queries of the item that comes next;
// - warpgroup 0: S^T = K Q^T, each warp 16 keys, codes straight from the rows into registers; the softmax;
// - warpgroups 1 and 2: O^T of two groups each, codes by transposing loads: of 16 columns and 8 keys a lane
//   gets two of each, which become rows g and g + 8 of a product: columns 2 g and 2 g + 1.
// A row's arithmetic does not depend on N, on the tile's other rows or on the items of its block.
#include <algorithm>

#include "cuda/mla_fp8.cuh"

namespace rodin::cuda {
namespace {

constexpr int kFp8Threads = 512;
// Of a thread, by warpgroup; at a launch there are 128.
constexpr int kScoreRegisters = 176;
constexpr int kValueRegisters = 144;
constexpr float kWeightsUp = 128;        // at most 2^8 without it: far from f16's end, and from its smallest
constexpr float kLeastScale = 0x1p-40f;  // of a key, as the maximum sees it

template <int N>
__device__ __forceinline__ void compute_fp8_scores(const MlaWgmmaParams& p, const MlaFp8Layout<N>& at) {
  constexpr int kColumns = N / 4;  // of a lane: 2 j + c
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int g = lane / 4, t = lane % 4;
  const auto row_bytes = static_cast<int>(p.mla.cache_stride);
  // Matrices of 8 keys and 16 bytes: two of keys, then of bytes.
  const int lane_at = (16 * warp + lane / 8 % 2 * 8 + lane % 8) * row_bytes + lane / 16 * 16;
  MlaItems items(p.mla);
  MlaItem item;
  Ring<kFp8Stages> ring;
  uint32_t queries_parity = 0, weights_parity = 1;
  int which = 0;
  while (items.take(item)) {
    float row_max[kColumns], row_sum[kColumns], column_scale[kColumns];  // [kColumns]
    barrier_wait(at.queries_full(), queries_parity);
    queries_parity ^= 1;
    prepare_queries(at, p.mla.softmax_scale * 1.4426950408889634f);  // into base 2
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      row_max[i] = -INFINITY, row_sum[i] = 0;
      column_scale[i] = load_shared_float(at.column_scale() + (8 * (i / 2) + 2 * t + i % 2) * 4);
    }
    for (int first = item.begin; first < item.end; first += kKeys) {
      barrier_wait(at.raw_full(ring.place), ring.parity);
      const bool is_edge = first + kKeys > item.limit(0, p.mla.num_heads) + 1 || first < p.mla.first_position;
      if (is_edge) clear_rows(p.mla, at, item, first, ring.place);
      const uint32_t raw = at.raw(ring.place);
      uint32_t keys[2][8][4], rope[4][4];      // [2, 8, 4] by step of 16 columns
      float part[2][N / 2], rope_part[N / 2];  // [2, N / 2] of the groups, in turn
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        load_matrix_x4(rope[step], raw + kFp8Rope + lane_at + step * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (16 * step + i / 2 * 8 >= p.mla.rope_dim) rope[step][i] = 0;
      }
      products_begin();
#pragma unroll
      for (int step = 0; step < 4; ++step)
        wgmma_registers<N, false>(rope_part, rope[step], matrix_descriptor(at.queries(0)) + 2 * step,
                                  step != 0);
      products_commit();
      const auto add_group = [&](int group) {
        uint32_t (&codes)[8][4] = keys[group % 2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t words[4];
          load_matrix_x4(words, raw + lane_at + group * kFp8Group + i * 32);
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            halves_of_e4m3(words[2 * odd], codes[2 * i + odd][0], codes[2 * i + odd][2]);
            halves_of_e4m3(words[2 * odd + 1], codes[2 * i + odd][1], codes[2 * i + odd][3]);
          }
        }
        products_begin();
#pragma unroll
        for (int step = 0; step < 8; ++step)
          wgmma_registers<N, true>(part[group % 2], codes[step],
                                   matrix_descriptor(at.queries(1 + 2 * group + step / 4)) + step % 4 * 2,
                                   step != 0);
        products_commit();
      };
      add_group(0);
      add_group(1);
      float scale[2][kFp8Groups];  // [2, kFp8Groups] of keys 16 warp + g and 8 further
      float most_scale[2];         // of a key, in base 2
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 bits = load_shared(raw + (16 * warp + g + 8 * half) * row_bytes + kMlaMaxLora);
        scale[half][0] = __uint_as_float(bits.x), scale[half][1] = __uint_as_float(bits.y);
        scale[half][2] = __uint_as_float(bits.z), scale[half][3] = __uint_as_float(bits.w);
        const float most =
            fmaxf(fmaxf(scale[half][0], scale[half][1]), fmaxf(scale[half][2], scale[half][3]));
        most_scale[half] = __log2f(fmaxf(most, kLeastScale));
      }
      float score[N / 2];  // [N / 2]
#pragma unroll
      for (int group = 0; group < kFp8Groups; ++group) {
        if (group + 1 < kFp8Groups) products_wait<1>();
        if (group + 1 == kFp8Groups) products_wait<0>();
        if (group == 0) pin(rope_part);
        pin(part[group % 2]);
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
          score[i] = fmaf(part[group % 2][i], scale[i / 2 % 2][group], group == 0 ? rope_part[i] : score[i]);
        if (group + 2 < kFp8Groups) add_group(group + 2);
      }
      ring.next();
      if (first + kKeys >= item.end) {
        __syncwarp();
        if (lane == 0) barrier_arrive(at.queries_empty());
      }

#pragma unroll
      for (int i = 0; i < N / 2; ++i) score[i] *= column_scale[i / 4 * 2 + i % 2];
      if (is_edge) {
        mask_keys<N>(p.mla, item, first, warp, g, t, score);
      }

      float most[kColumns];  // [kColumns]
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        most[i] =
            fmaxf(score[4 * (i / 2) + i % 2] + most_scale[0], score[4 * (i / 2) + 2 + i % 2] + most_scale[1]);
      float shrink[kColumns];  // [kColumns]
      move_maxima<N>(most, at.warp_max(which), 1, row_max, shrink);
      which ^= 1;

#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float base = row_max[2 * j + c % 2] == -INFINITY ? 0.0f : row_max[2 * j + c % 2];
          score[4 * j + c] = exp2_fast(score[4 * j + c] - base);
        }
#pragma unroll
        for (int c = 0; c < 2; ++c)
          row_sum[2 * j + c] =
              fmaf(row_sum[2 * j + c], shrink[2 * j + c], score[4 * j + c] + score[4 * j + 2 + c]);
      }
      barrier_wait(at.weights_empty(), weights_parity);
      weights_parity ^= 1;
#pragma unroll
      for (int group = 0; group < kFp8Groups; ++group) {
        const float own[2] = {scale[0][group] * kWeightsUp, scale[1][group] * kWeightsUp};
#pragma unroll
        for (int j = 0; j < N / 8; j += 2) {
          uint32_t four[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* two = score + 4 * (j + i / 2) + 2 * (i % 2);
            const __half2 pair = __floats2half2_rn(two[0] * own[i % 2], two[1] * own[i % 2]);
            four[i] = *reinterpret_cast<const uint32_t*>(&pair);
          }
          const int column = 8 * (j + lane / 16) + lane % 8, word = 2 * warp + lane / 8 % 2;
          store_matrix_x4_trans(at.weights(group) + column * 128 + ((word ^ (column & 7)) * 16), four);
        }
      }
      if (warp == 0 && g == 0) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
          store_shared_float(at.shrink() + (8 * (i / 2) + 2 * t + i % 2) * 4, shrink[i]);
      }
      shared_fence();
      barrier_arrive(at.weights_full());
    }

    finish_sums<N>(p.mla, item, at, row_max, row_sum, 1, which, weights_parity);
    which ^= 1;
  }
}

// Warpgroup 1 + kHalf: columns 256 kHalf .. + 255 of the values, four boxes.
template <int N, int kHalf>
__device__ __forceinline__ void compute_fp8_values(const MlaWgmmaParams& p, const MlaFp8Layout<N>& at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int g = lane / 4, t = lane % 4;
  const auto row_bytes = static_cast<int>(p.mla.cache_stride);
  const int lane_at = lane * row_bytes + 256 * kHalf + 16 * warp;  // matrices of 8 keys and 16 columns
  MlaItems items(p.mla);
  MlaItem item;
  Ring<kFp8Stages> ring;
  uint32_t weights_parity = 0;
  while (items.take(item)) {
    float out[4][N / 2] = {};  // [4, N / 2] by box
    for (int first = item.begin; first < item.end; first += kKeys) {
      barrier_wait(at.raw_full(ring.place), ring.parity);
      barrier_wait(at.weights_full(), weights_parity);
      weights_parity ^= 1;
      shrink_sums<N>(out, at.shrink());
#pragma unroll
      for (int i = 0; i < 4; ++i) pin(out[i]);
      uint32_t values[2][4][4];  // [2, 4, 4] by box and step of 16 keys
#pragma unroll
      for (int box = 0; box < 4; ++box) {
        uint32_t (&own)[4][4] = values[box % 2];
        if (box > 1) products_wait<1>();  // what these registers were for
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t words[4];
          load_matrix_x4_trans(words, at.raw(ring.place) + lane_at + 32 * i * row_bytes + 64 * box);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            halves_of_e4m3(__byte_perm(words[j], 0, 0x3120), own[2 * i + j / 2][j % 2 * 2],
                           own[2 * i + j / 2][j % 2 * 2 + 1]);
        }
        const uint64_t weights = matrix_descriptor(at.weights(2 * kHalf + box / 2));
        products_begin();
#pragma unroll
        for (int step = 0; step < 4; ++step)
          wgmma_registers<N, true>(out[box], own[step], weights + 2 * step, 1);
        products_commit();
      }
      // All lanes, for racecheck; warpgroup 0 was done with the stage before the weights were full.
      barrier_arrive(at.raw_empty(ring.place));
      ring.next();
      products_wait<0>();
#pragma unroll
      for (int i = 0; i < 4; ++i) pin(out[i]);
      barrier_arrive(at.weights_empty());
    }

    const int64_t row = item.row(p.mla);
    if (is_whole(p.mla)) {
      barrier_wait(at.weights_full(), weights_parity);
      weights_parity ^= 1;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const int column = 8 * (i / 2) + 2 * t + i % 2;
        if (column >= item.tile.num_rows) continue;
        const float inverse = load_shared_float(at.shrink() + column * 4) * (1 / kWeightsUp);
        uint32_t* to = whole_row(p.mla, row + column) + (256 * kHalf + 16 * warp + 2 * g) / 2;
#pragma unroll
        for (int box = 0; box < 4; ++box)
          to[32 * box] =
              pack_bf16(out[box][4 * (i / 2) + i % 2] * inverse, out[box][4 * (i / 2) + 2 + i % 2] * inverse);
      }
      barrier_arrive(at.weights_empty());
      continue;
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int column = 8 * (i / 2) + 2 * t + i % 2;
      if (column >= item.tile.num_rows || item.limit(column, p.mla.num_heads) < item.begin) continue;
      float* to = p.mla.partial + ((row + column) * p.mla.max_splits + item.split) * kMlaMaxLora +
                  256 * kHalf + 16 * warp + 2 * g;
#pragma unroll
      for (int box = 0; box < 4; ++box)
        *reinterpret_cast<float2*>(to + 64 * box) =
            make_float2(out[box][4 * (i / 2) + i % 2] * (1 / kWeightsUp),
                        out[box][4 * (i / 2) + 2 + i % 2] * (1 / kWeightsUp));
    }
  }
}

template <int N>
__global__ void __launch_bounds__(kFp8Threads, 1) mla_fp8_kernel(const __grid_constant__ MlaWgmmaParams p) {
  using L = MlaFp8Layout<N>;
  extern __shared__ __align__(1024) char shared[];
  L at;
  at.base = shared_address(shared);
  let_successor_begin();
  if (threadIdx.x == 0) {
    if (at.base % 1024 != 0) __trap();  // swizzled boxes
    for (int i = 0; i < kFp8Stages; ++i) {
      barrier_init(at.raw_full(i), 1);
      barrier_init(at.raw_empty(i), 256);
    }
    init_barriers(p, at);
  }
  __syncthreads();
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
  if (group == 0) {
    take_registers<kScoreRegisters>();
    compute_fp8_scores(p, at);
  } else if (group == 1) {
    take_registers<kValueRegisters>();
    compute_fp8_values<N, 0>(p, at);
  } else if (group == 2) {
    take_registers<kValueRegisters>();
    compute_fp8_values<N, 1>(p, at);
  } else {
    give_registers<48>();
    if (warp == 0) bring_rows(p, at);
    if (warp == 1 && threadIdx.x % 32 == 0) bring_queries(p, at);
  }
}

template <int N>
void launch(const MlaWgmmaParams& p, cudaStream_t stream) {
  const int blocks = std::min(p.mla.num_tiles * p.mla.max_splits, p.num_multiprocessors);
  launch_overlapped(mla_fp8_kernel<N>, dim3(static_cast<unsigned>(blocks)), kFp8Threads,
                    MlaFp8Layout<N>::kBytes, stream, p, "mla_fp8_kernel");
}

}  // namespace

void run_mla_fp8(const MlaWgmmaParams& params, cudaStream_t stream) {
  if (params.mla.num_tiles == 0) return;
  params.mla.tile_rows == 16 ? launch<16>(params, stream) : launch<32>(params, stream);
}

void prepare_mla_fp8() {
  raise_shared_limit(mla_fp8_kernel<16>, MlaFp8Layout<16>::kBytes);
  raise_shared_limit(mla_fp8_kernel<32>, MlaFp8Layout<32>::kBytes);
}

}  // namespace rodin::cuda
