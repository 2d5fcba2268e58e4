// Scores and softmax of mla_wgmma.cu: the work of its first warpgroup.
#pragma once

#include "cuda/mla_wgmma.cuh"

namespace rodin::cuda {

constexpr float kLazyBits = 8;  // a weight is at most 2^8

// Maxima over the 8 lanes that share columns: each step halves the values of a lane, as long as they are even
// in number. values[0 .. result - 1] are those of columns offset ..
template <int kCount>
__device__ __forceinline__ int maximise(float (&values)[kCount], int& offset) {
  const int lane = threadIdx.x % 32;
  int count = kCount;
  offset = 0;
#pragma unroll
  for (int bit = 16; bit >= 4; bit /= 2) {
    if (count % 2 == 0) {
      count /= 2;
      const bool is_upper = (lane & bit) != 0;
      if (is_upper) offset += count;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        if (i >= count) break;
        const float own = is_upper ? values[count + i] : values[i];
        const float other = is_upper ? values[i] : values[count + i];
        values[i] = fmaxf(own, __shfl_xor_sync(kAllLanes, other, bit));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i >= count) break;
        values[i] = fmaxf(values[i], __shfl_xor_sync(kAllLanes, values[i], bit));
      }
    }
  }
  return count;
}

// One warpgroup: zeros in place of a block's keys that nobody attends to. They have a weight of 0, but may
// hold anything.
template <int N>
__device__ __forceinline__ void clear_outside(const MlaParams& p, const MlaLayout<N>& at, const MlaItem& item,
                                              int first, const int (&slots)[kThirds]) {
  const int begin = max(p.first_position - first, 0), end = min(item.end - first, kKeys);
  for (int i = threadIdx.x % 128; i < kKeys * 64; i += 128) {
    const int row = i / 64, word = i % 64, box = 1 + word / 8;  // box 0 holds no values
    if (row >= begin && row < end) continue;
    const int slot = box < 3 ? slots[0] : box < 6 ? slots[1] : slots[2];
    store_shared(at.slot(slot) + box % 3 * kBoxBytes + row * 128 + word % 8 * 16, make_uint4(0, 0, 0, 0));
  }
}

// Scores of a block's keys that are behind a row's own position, or before the first one attended to: none.
template <int N>
__device__ __forceinline__ void mask_keys(const MlaParams& p, const MlaItem& item, int first,
                                          int warp, int g, int t, float (&score)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const int limit = item.limit(8 * (i / 2) + 2 * t + i % 2, p.num_heads);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = first + 16 * warp + g + 8 * half;
      if (position > limit || position < p.first_position) score[4 * (i / 2) + 2 * half + i % 2] = -INFINITY;
    }
  }
}

// Moves a row's maximum where a block's exceeds it by enough, and gives what earlier sums are multiplied by.
__device__ __forceinline__ float move_maximum(float& row_max, float seen, float scale) {
  const float old = row_max;
  if (old == -INFINITY) {
    row_max = seen;  // nothing has been added up yet
    return 1;
  }
  if (!((seen - old) * scale > kLazyBits)) return 1;
  row_max = seen;
  return exp2_fast((old - seen) * scale);
}

// One warpgroup: the products of a block's keys with the queries, from the ring; keys are the rows of the
// instruction, but for N = 64, where queries are.
template <int N>
__device__ __forceinline__ void multiply_keys(const MlaLayout<N>& at, Ring<MlaLayout<N>::kSlots>& ring,
                                              int (&slots)[kThirds], float (&score)[N / 2]) {
  using L = MlaLayout<N>;
#pragma unroll
  for (int third = 0; third < kThirds; ++third) {
    slots[third] = ring.place;
    barrier_wait(at.full(ring.place), ring.parity);
    products_begin();
    const uint64_t keys = matrix_descriptor(at.slot(ring.place));
    const uint64_t queries = matrix_descriptor(at.queries(third * kThirdBoxes));
#pragma unroll
    for (int box = 0; box < kThirdBoxes; ++box) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint64_t key = keys + box * (kBoxBytes / 16) + 2 * step;
        const uint64_t query = queries + box * (L::kQueryBox / 16) + 2 * step;
        wgmma_narrow<N, 0>(score, N == 64 ? query : key, N == 64 ? key : query, third + box + step != 0);
      }
    }
    ring.next();
  }
  products_commit();
  products_wait<0>();
  pin(score);
}

// A block's maxima of the four warps, `most` a lane's own, meet at `warp_max` and move those of the rows.
template <int N>
__device__ __forceinline__ void move_maxima(float (&most)[N / 4], uint32_t warp_max, float scale,
                                            float (&row_max)[N / 4], float (&shrink)[N / 4]) {
  const int warp = threadIdx.x / 32 % 4, t = threadIdx.x % 4;
  int offset;
  const int count = maximise(most, offset);
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    if (i >= count) break;
    store_shared_float(warp_max + (warp * N + (offset + i) / 2 * 8 + 2 * t + (offset + i) % 2) * 4, most[i]);
  }
  group_sync<kScoresBarrier, 128>();
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    float2 block_max = load_shared_float2(warp_max + (8 * j + 2 * t) * 4);
#pragma unroll
    for (int w = 1; w < 4; ++w) {
      const float2 other = load_shared_float2(warp_max + (w * N + 8 * j + 2 * t) * 4);
      block_max.x = fmaxf(block_max.x, other.x), block_max.y = fmaxf(block_max.y, other.y);
    }
    shrink[2 * j] = move_maximum(row_max[2 * j], block_max.x, scale);
    shrink[2 * j + 1] = move_maximum(row_max[2 * j + 1], block_max.y, scale);
  }
}

// The end of an item for warpgroup 0 of N columns: the sums of its four warps, in order, with the maxima
// times `scale` to the splits' results; rows of one split leave theirs to the values' warpgroups.
template <int N, class Layout>
__device__ __forceinline__ void finish_sums(const MlaParams& p, const MlaItem& item, const Layout& at,
                                            const float (&row_max)[N / 4], float (&row_sum)[N / 4],
                                            float scale, int which, uint32_t& weights_parity) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
#pragma unroll
    for (int bit = 16; bit >= 4; bit /= 2) row_sum[i] += __shfl_xor_sync(kAllLanes, row_sum[i], bit);
    if (g == 0)
      store_shared_float(at.warp_max(which) + (warp * N + 8 * (i / 2) + 2 * t + i % 2) * 4, row_sum[i]);
  }
  group_sync<kScoresBarrier, 128>();
  if (is_whole(p)) {  // the sums pass as one more block's shrink does
    barrier_wait(at.weights_empty(), weights_parity);
    weights_parity ^= 1;
  }
  if (warp == 0 && g == 0) {
    const int64_t row = item.row(p);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int column = 8 * (i / 2) + 2 * t + i % 2;
      float sum = load_shared_float(at.warp_max(which) + column * 4);
#pragma unroll
      for (int w = 1; w < 4; ++w) sum += load_shared_float(at.warp_max(which) + (w * N + column) * 4);
      if (is_whole(p)) store_shared_float(at.shrink() + column * 4, sum > 0 ? 1 / sum : 1);
      if (is_whole(p) || column >= item.tile.num_rows || item.limit(column, p.num_heads) < item.begin)
        continue;
      float* to = p.partial_ml + 2 * ((row + column) * p.max_splits + item.split);
      to[0] = row_max[i] * scale;
      to[1] = sum;
    }
  }
  if (is_whole(p)) barrier_arrive(at.weights_full());
}

// What a values' warpgroup has added up, times the factors at `from` by which a block's maxima shrink it.
template <int N>
__device__ __forceinline__ void shrink_sums(float (&out)[4][N / 2], uint32_t from) {  // [4, N / 2] by box
  const int t = threadIdx.x % 4;
  float2 shrink[N / 8];  // [N / 8]
  bool is_shrinking = false;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    shrink[j] = load_shared_float2(from + (8 * j + 2 * t) * 4);
    is_shrinking |= shrink[j].x != 1 || shrink[j].y != 1;
  }
  if (__any_sync(kAllLanes, is_shrinking)) {
#pragma unroll
    for (int box = 0; box < 4; ++box)
#pragma unroll
      for (int i = 0; i < N / 2; ++i) out[box][i] *= i % 2 == 0 ? shrink[i / 4].x : shrink[i / 4].y;
  }
}

// Warpgroup 0, N = 16 or 32. A lane holds keys 16 warp + g and 8 further of columns 8 j + 2 t + c.
template <int N>
__device__ __forceinline__ void compute_scores(const MlaWgmmaParams& p, const MlaLayout<N>& at) {
  using L = MlaLayout<N>;
  constexpr int kColumns = N / 4;  // of a lane: 2 j + c
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int g = lane / 4, t = lane % 4;
  const float scale = p.mla.softmax_scale * 1.4426950408889634f;  // into base 2
  MlaItems items(p.mla);
  MlaItem item;
  Ring<L::kSlots> ring;
  uint32_t queries_parity = 0, weights_parity = 1;
  int which = 0;
  while (items.take(item)) {
    float row_max[kColumns], row_sum[kColumns];  // [kColumns]
#pragma unroll
    for (int i = 0; i < kColumns; ++i) row_max[i] = -INFINITY, row_sum[i] = 0;
    barrier_wait(at.queries_full(), queries_parity);
    queries_parity ^= 1;
    for (int first = item.begin; first < item.end; first += kKeys) {
      float score[N / 2];  // [N / 2]
      int slots[kThirds];
      multiply_keys<N>(at, ring, slots, score);
      if (first + kKeys >= item.end) {
        __syncwarp();
        if (lane == 0) barrier_arrive(at.queries_empty());
      }

      const bool is_edge = first + kKeys > item.limit(0, p.mla.num_heads) + 1 || first < p.mla.first_position;
      if (is_edge) {
        mask_keys<N>(p.mla, item, first, warp, g, t, score);
        clear_outside(p.mla, at, item, first, slots);
      }

      float most[kColumns];  // [kColumns]
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        most[i] = fmaxf(score[4 * (i / 2) + i % 2], score[4 * (i / 2) + 2 + i % 2]);
      float shrink[kColumns];  // [kColumns]
      move_maxima<N>(most, at.warp_max(which), scale, row_max, shrink);
      which ^= 1;

      uint32_t weights[N / 4];  // [N / 4] by j and half
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        float weight[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float base = row_max[2 * j + c % 2] == -INFINITY ? 0.0f : row_max[2 * j + c % 2] * scale;
          weight[c] = exp2_fast(fmaf(score[4 * j + c], scale, -base));
        }
#pragma unroll
        for (int c = 0; c < 2; ++c)
          row_sum[2 * j + c] = fmaf(row_sum[2 * j + c], shrink[2 * j + c], weight[c] + weight[2 + c]);
        weights[2 * j] = pack_bf16(weight[0], weight[1]);
        weights[2 * j + 1] = pack_bf16(weight[2], weight[3]);
      }
      barrier_wait(at.weights_empty(), weights_parity);
      weights_parity ^= 1;
#pragma unroll
      for (int j = 0; j < N / 8; j += 2) {
        const uint32_t four[4] = {weights[2 * j], weights[2 * j + 1], weights[2 * j + 2], weights[2 * j + 3]};
        const int column = 8 * (j + lane / 16) + lane % 8, word = 2 * warp + lane / 8 % 2;
        store_matrix_x4_trans(at.weights() + column * 128 + ((word ^ (column & 7)) * 16), four);
      }
      if (warp == 0 && g == 0) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
          store_shared_float(at.shrink() + (8 * (i / 2) + 2 * t + i % 2) * 4, shrink[i]);
      }
      shared_fence();
      barrier_arrive(at.weights_full());
    }

    finish_sums<N>(p.mla, item, at, row_max, row_sum, scale, which, weights_parity);
    which ^= 1;
  }
}

// The same for N = 64: S = Q K^T, so that a row's scores lie in the four lanes of a quad. A lane holds rows
// 16 warp + g and 8 further, keys 8 j + 2 t + c. Products, weights and sums have the bits of the other form:
// there, warp w of lanes g = 2 t + c adds up keys 16 w + g and 8 further.
__device__ __forceinline__ void compute_wide_scores(const MlaWgmmaParams& p, const MlaLayout<64>& at) {
  using L = MlaLayout<64>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int g = lane / 4, t = lane % 4;
  const float scale = p.mla.softmax_scale * 1.4426950408889634f;  // into base 2
  MlaItems items(p.mla);
  MlaItem item;
  Ring<L::kSlots> ring;
  uint32_t queries_parity = 0, weights_parity = 1;
  while (items.take(item)) {
    float row_max[2] = {-INFINITY, -INFINITY};
    float row_sum[2][4][2] = {};  // [half, w, c]
    const int rows[2] = {16 * warp + g, 16 * warp + g + 8};
    const int limits[2] = {item.limit(rows[0], p.mla.num_heads), item.limit(rows[1], p.mla.num_heads)};
    barrier_wait(at.queries_full(), queries_parity);
    queries_parity ^= 1;
    for (int first = item.begin; first < item.end; first += kKeys) {
      float score[32];  // [32]
      int slots[kThirds];
      multiply_keys<64>(at, ring, slots, score);
      if (first + kKeys >= item.end) {
        __syncwarp();
        if (lane == 0) barrier_arrive(at.queries_empty());
      }
      if (first + kKeys > item.limit(0, p.mla.num_heads) + 1 || first < p.mla.first_position) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int position = first + 8 * (i / 4) + 2 * t + i % 2;
          if (position > limits[i / 2 % 2] || position < p.mla.first_position) score[i] = -INFINITY;
        }
        clear_outside(p.mla, at, item, first, slots);
        shared_fence();
      }

      float shrink[2], base[2];  // [2]
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float seen[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < 8; ++j)
          seen[j % 4] = fmaxf(seen[j % 4], fmaxf(score[4 * j + 2 * half], score[4 * j + 2 * half + 1]));
        float most = fmaxf(fmaxf(seen[0], seen[1]), fmaxf(seen[2], seen[3]));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        shrink[half] = move_maximum(row_max[half], most, scale);
        base[half] = row_max[half] == -INFINITY ? 0.0f : row_max[half] * scale;
      }
      uint32_t weights[8][2];  // [8, 2] by j and half
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float weight[2][2];  // [j % 2, c]
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const float own = score[4 * (2 * w + odd) + 2 * half + c];
              weight[odd][c] = exp2_fast(fmaf(own, scale, -base[half]));
            }
            weights[2 * w + odd][half] = pack_bf16(weight[odd][0], weight[odd][1]);
          }
#pragma unroll
          for (int c = 0; c < 2; ++c)
            row_sum[half][w][c] = fmaf(row_sum[half][w][c], shrink[half], weight[0][c] + weight[1][c]);
        }
      }
      barrier_wait(at.weights_empty(), weights_parity);
      weights_parity ^= 1;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const uint32_t four[4] = {weights[j][0], weights[j][1], weights[j + 1][0], weights[j + 1][1]};
        const int row = 16 * warp + lane / 8 % 2 * 8 + lane % 8, word = j + lane / 16;
        store_matrix_x4(at.weights() + row * 128 + ((word ^ (row & 7)) * 16), four);
      }
      if (t == 0) {
        store_shared_float(at.shrink() + rows[0] * 4, shrink[0]);
        store_shared_float(at.shrink() + rows[1] * 4, shrink[1]);
      }
      barrier_arrive(at.weights_full());  // they go to registers: no fence
    }

    if (is_whole(p.mla)) {  // the sums pass as one more block's shrink does
      barrier_wait(at.weights_empty(), weights_parity);
      weights_parity ^= 1;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& own = row_sum[half][w][c];
          own += __shfl_xor_sync(kAllLanes, own, 2);
          own += __shfl_xor_sync(kAllLanes, own, 1);
        }
        const float both = row_sum[half][w][0] + row_sum[half][w][1];
        sum = w == 0 ? both : sum + both;
      }
      if (is_whole(p.mla)) {
        if (t == 0) store_shared_float(at.shrink() + rows[half] * 4, sum > 0 ? 1 / sum : 1);
      } else if (t == 0 && rows[half] < item.tile.num_rows && limits[half] >= item.begin) {
        const int64_t row = item.row(p.mla) + rows[half];
        reinterpret_cast<float2*>(p.mla.partial_ml)[row * p.mla.max_splits + item.split] =
            make_float2(row_max[half] * scale, sum);
      }
    }
    if (is_whole(p.mla)) barrier_arrive(at.weights_full());
  }
}

}  // namespace rodin::cuda
