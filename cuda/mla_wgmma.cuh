// Shared memory of mla_wgmma.cu, the work of a block, and how keys and queries get there.
#pragma once

#include "cuda/hopper_narrow.cuh"
#include "cuda/mla_wgmma.h"

namespace rodin::cuda {

constexpr int kKeys = kMlaKeyBlock;
constexpr int kBoxes = kMlaMaxLatent / kMlaBoxColumns;  // of a row
constexpr int kBoxBytes = kKeys * 128;
constexpr int kThirds = 3;  // of a block of keys: the unit of the ring
constexpr int kThirdBoxes = kBoxes / kThirds;
constexpr int kThirdBytes = kThirdBoxes * kBoxBytes;
// Which columns of a row lie in a place of its kBoxes: the rotary part comes first, so that the first third,
// whose values are two boxes, is free early.
__host__ __device__ constexpr int columns_at(int place) {
  return (place + kBoxes - 1) % kBoxes * kMlaBoxColumns;
}
constexpr int kSharedLimit = 232448;

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t to, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ float load_shared_float(uint32_t from) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ float2 load_shared_float2(uint32_t from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared_float(uint32_t to, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}

// N: rows of a tile. Bytes of shared memory, from `base` on, which is a multiple of 1024.
template <int N>
struct MlaLayout {
  static constexpr int kQueryBox = N * 128;
  static constexpr int kWeightBytes = N * kKeys * 2;
  static constexpr int kSlots = N == 16 ? 8 : N == 32 ? 7 : 6;  // of the ring

  static constexpr int kQueries = kSlots * kThirdBytes;
  static constexpr int kWeights = kQueries + kBoxes * kQueryBox;
  static constexpr int kWarpMax = kWeights + kWeightBytes;
  static constexpr int kShrink = kWarpMax + 2 * 4 * N * 4;
  static constexpr int kBarriers = kShrink + N * 4;
  static constexpr int kBytes = kBarriers + (2 * kSlots + 4) * 8;
  static_assert(kBytes <= kSharedLimit);

  uint32_t base;

  __device__ uint32_t slot(int i) const { return base + i * kThirdBytes; }
  __device__ uint32_t queries(int box) const { return base + kQueries + box * kQueryBox; }
  __device__ uint32_t weights() const { return base + kWeights; }  // bf16 [N, kKeys] of the softmax
  // float32 [2, 4, N], used in turn; and [N]
  __device__ uint32_t warp_max(int which) const { return base + kWarpMax + which * 16 * N; }
  __device__ uint32_t shrink() const { return base + kShrink; }
  __device__ uint32_t full(int i) const { return base + kBarriers + 16 * i; }
  __device__ uint32_t empty(int i) const { return full(i) + 8; }
  __device__ uint32_t queries_full() const { return full(kSlots); }
  __device__ uint32_t queries_empty() const { return queries_full() + 8; }
  // All threads of their warpgroups arrive: racecheck does not see that __syncwarp() and one lane's arrival
  // order what the other lanes wrote and read.
  __device__ uint32_t weights_full() const { return queries_full() + 16; }
  __device__ uint32_t weights_empty() const { return queries_full() + 24; }
};

constexpr int kScoresBarrier = 1;  // of warpgroup 0's threads

// A place in a ring of kCount, and the parity of the phase in which it is full.
template <int kCount>
struct Ring {
  int place = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++place == kCount) place = 0, parity ^= 1;
  }
};

// Keys begin .. end - 1 for the rows of a tile.
struct MlaItem {
  MlaTile tile;
  int split, begin, end;

  // The tile's first (token, head) of the chunk.
  __device__ int64_t row(const MlaParams& p) const {
    return static_cast<int64_t>(tile.first_token - p.first_token) * p.num_heads + tile.row_begin;
  }
  // Last position that row `row` of the tile attends to.
  __device__ int limit(int row, int num_heads) const {
    return tile.first_position + (tile.row_begin + row) / num_heads;
  }
};

// Whether rows have one split each: their results go to `out` at once, and nobody puts splits together.
__device__ __forceinline__ bool is_whole(const MlaParams& p) { return p.max_splits == 1; }
// Pairs of bf16.
__device__ __forceinline__ uint32_t* whole_row(const MlaParams& p, int64_t row) {
  return reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + row * p.out_stride);
}

// The items of a block, one after the other: the first splits of all tiles, then the second ones.
struct MlaItems {
  const MlaParams& p;
  int next;

  __device__ explicit MlaItems(const MlaParams& params) : p(params), next(blockIdx.x) {}
  __device__ bool take(MlaItem& item) {
    for (; next < p.num_tiles * p.max_splits; next += gridDim.x) {
      const int4* from = reinterpret_cast<const int4*>(p.tiles + next % p.num_tiles);
      reinterpret_cast<int4*>(&item.tile)[0] = __ldg(from);
      reinterpret_cast<int4*>(&item.tile)[1] = __ldg(from + 1);
      item.split = next / p.num_tiles;
      item.begin = item.split << item.tile.split_shift;
      item.end = min(item.begin + (1 << item.tile.split_shift), item.tile.max_position + 1);
      if (item.begin >= item.end) continue;
      next += gridDim.x;
      return true;
    }
    return false;
  }
};

// The slots of an item's keys, by pieces of neighbouring ones; for a whole warp.
struct MlaPieces {
  const MlaParams& p;
  const int rows;  // of a piece
  int slots = 0;   // lane i: the first slot of the piece 32 n + i

  __device__ void find(const MlaItem& item, int first_piece) {
    const int position = item.begin + (first_piece + static_cast<int>(threadIdx.x) % 32) * rows;
    if (position < item.end) {
      const int32_t* table = p.block_table + item.tile.table_start;
      slots = __ldg(table + position / p.block_size) * p.block_size + position % p.block_size;
    }
  }
};

// One warp: bring(pieces, item, first piece, keys) for every block of kKeys keys of all items. The kernel
// ahead is waited for where a block has keys of this step, and at the end.
template <class Bring>
__device__ __forceinline__ void for_key_blocks(const MlaWgmmaParams& p, const Bring& bring) {
  const int rows = p.piece_rows;
  MlaItems items(p.mla);
  bool has_waited = false;
  MlaItem item, following;
  MlaPieces pieces{p.mla, rows}, following_pieces{p.mla, rows};
  bool has_item = items.take(item);
  if (has_item) pieces.find(item, 0);
  while (has_item) {
    const bool has_following = items.take(following);
    if (has_following) following_pieces.find(following, 0);
    for (int first = item.begin; first < item.end; first += kKeys) {
      const int count = min(kKeys, item.end - first);
      if (!has_waited && first + count > item.tile.first_position) {
        wait_for_predecessor();
        has_waited = true;
      }
      bring(pieces, item, (first - item.begin) / rows, count);
    }
    item = following;
    pieces.slots = following_pieces.slots;
    has_item = has_following;
  }
  if (!has_waited) wait_for_predecessor();
}

// One warp: the keys of all items into the ring. Those that earlier steps wrote come before the kernel ahead
// has ended.
template <int N>
__device__ __forceinline__ void bring_keys(const MlaWgmmaParams& p, const MlaLayout<N>& at) {
  const int rows = p.piece_rows;
  Ring<MlaLayout<N>::kSlots> ring;
  for_key_blocks(p, [&](MlaPieces& pieces, const MlaItem& item, int first_piece, int count) {
    const int num_pieces = (count + rows - 1) / rows;
    if (first_piece > 0 && first_piece % 32 == 0) pieces.find(item, first_piece);
#pragma unroll
    for (int third = 0; third < kThirds; ++third) {
      barrier_wait(at.empty(ring.place), ring.parity ^ 1);
      __syncwarp();  // lanes that leave the wait one by one would elect one each
      if (is_elected()) barrier_expect(at.full(ring.place), kThirdBoxes * num_pieces * rows * 128);
      __syncwarp();
      for (int i = 0; i < num_pieces; ++i) {
        const int slot = __shfl_sync(kAllLanes, pieces.slots, (first_piece + i) % 32);
        if (is_elected()) {
#pragma unroll
          for (int box = 0; box < kThirdBoxes; ++box) {
            copy_box(at.slot(ring.place) + box * kBoxBytes + i * rows * 128, &p.cache,
                     columns_at(third * kThirdBoxes + box), slot, at.full(ring.place));
          }
        }
      }
      ring.next();
    }
  });
}

// One thread: the queries of all items. A box's rows behind the tile's are another sequence's, or zeros.
template <class Layout>
__device__ __forceinline__ void bring_queries(const MlaWgmmaParams& p, const Layout& at) {
  wait_for_predecessor();
  MlaItems items(p.mla);
  MlaItem item;
  for (uint32_t parity = 1; items.take(item); parity ^= 1) {
    barrier_wait(at.queries_empty(), parity);
    barrier_expect(at.queries_full(), kBoxes * at.kQueryBox);
    const int row = item.tile.first_token * p.mla.num_heads + item.tile.row_begin;
    copy_box(at.queries(0), &p.q_rope, 0, row, at.queries_full());
#pragma unroll
    for (int place = 1; place < kBoxes; ++place)
      copy_box(at.queries(place), &p.q_latent, columns_at(place), row - p.mla.first_token * p.mla.num_heads,
               at.queries_full());
  }
}

// The thread that initialises a block's barriers: those that its warpgroups have beside the ring's, which are
// done before.
template <class Layout>
__device__ __forceinline__ void init_barriers(const MlaWgmmaParams& p, const Layout& at) {
  barrier_init(at.queries_full(), 1);
  barrier_init(at.queries_empty(), 4);
  barrier_init(at.weights_full(), 128);
  barrier_init(at.weights_empty(), 256);
  barrier_init_fence();
  prefetch_map(&p.q_latent);
  prefetch_map(&p.q_rope);
}

}  // namespace rodin::cuda
