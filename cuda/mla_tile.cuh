// What mla.cu keeps in shared memory, and how keys and queries get there.
#pragma once

#include "cuda/common.cuh"

namespace rodin::cuda {

constexpr int kKeys = kMlaKeyBlock;

// Byte offset of 16-byte word `word` of row `row` in a tile of `words` words a row (a multiple of 8): within
// each 8 words the place is rotated by the row, so that 8 rows of one word lie in 8 different bank groups.
__device__ __forceinline__ uint32_t swizzled(int row, int word, int words) {
  return static_cast<uint32_t>(row * words + (word ^ (row & 7))) * 16;
}

constexpr int kMlaWarps = 16;  // of a block
constexpr int kMlaRows = 16;   // of a tile

struct MlaShared {
  uint32_t query, keys, weights;  // shared addresses
  uint32_t key_bytes;             // of a key buffer: there are two
  float* row_max;                 // [kMlaRows, 8] of the 8-key tiles
  float* tile_sum;                // [kMlaRows, 8]
  int* limit;                     // [kMlaRows] last position that a row attends to, -1: no such row
  float* odd_scores;              // [8, 32, 4] the odd chains, by key tile, lane and element
};

constexpr int mla_shared_bytes(int padded) {
  return kMlaRows * padded * 2 + 2 * kKeys * padded * 2 + kMlaRows * kKeys * 2 + 2 * kMlaRows * 8 * 4 +
         kMlaRows * 4 + 8 * 32 * 4 * 4;
}

// Columns of a row in shared memory: a multiple of 64 elements, zeros behind the latent.
__device__ __forceinline__ int padded_latent(const MlaParams& p) {
  return (p.lora_rank + p.rope_dim + 63) / 64 * 64;
}

// Brings key blocks of one tile's sequence into shared memory; zeros outside [first_position, max_position].
struct KeyLoader {
  static constexpr int kKeysEach = kKeys / kMlaWarps;  // keys of a warp: warp, warp + kMlaWarps, ..
  static constexpr int kMaxWords = (kMlaMaxLatent / 8 + 31) / 32;

  const MlaParams& p;
  const int32_t* table;
  int max_position;
  int latent, words;
  bool is_aligned;
  int slot;  // lane i: of this warp's i-th key in the block that comes next, -1 where there is none

  // Looks up the slots of key block `first ..` ahead of bring(), so that nobody waits for them there.
  __device__ void find_slots(int first) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    slot = -1;
    if (lane < kKeysEach) {
      const int position = first + warp + kMlaWarps * lane;
      if (position >= p.first_position && position <= max_position) {
        slot = table[position / p.block_size] * p.block_size + position % p.block_size;
      }
    }
  }

  __device__ void bring(uint32_t to) const {
    static_assert(kMlaWarps % 8 == 0);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t row_bytes = words * 16;
    const uint32_t lane_at =
        to + warp * row_bytes + (lane ^ (warp & 7)) * 16;  // every key of a warp rotates alike
#pragma unroll
    for (int i = 0; i < kKeysEach; ++i) {
      const int key_slot = __shfl_sync(kAllLanes, slot, i);
      const bf16* row = static_cast<const bf16*>(p.cache) + (key_slot < 0 ? 0 : key_slot) * p.cache_stride;
      const uint32_t key_at = lane_at + i * kMlaWarps * row_bytes;
#pragma unroll
      for (int j = 0; j < kMaxWords; ++j) {
        const int word = lane + 32 * j;
        if (word >= words) break;
        if (is_aligned) {
          const bool is_there = key_slot >= 0 && word * 8 < latent;
          copy_async_16(key_at + 512 * j, is_there ? row + word * 8 : row, is_there);
        } else {
          store_word(key_at + 512 * j, row, word, key_slot >= 0);
        }
      }
    }
  }

  __device__ void store_word(uint32_t at, const bf16* row, int word, bool is_there) const {
    uint32_t pairs[4];  // [4]
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = word * 8 + 2 * j;
      const uint16_t* bits = reinterpret_cast<const uint16_t*>(row);
      const uint32_t low = is_there && c < latent ? bits[c] : 0;
      const uint32_t high = is_there && c + 1 < latent ? bits[c + 1] : 0;
      pairs[j] = low | high << 16;
    }
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(pairs[0]), "r"(pairs[1]),
                 "r"(pairs[2]), "r"(pairs[3])
                 : "memory");
  }
};

// Queries into shared memory: row r is row tile.row_begin + r of the sequence's [q_len, A].
__device__ __forceinline__ void load_queries(const MlaParams& p, const MlaTile& tile, int first_token,
                                             char* to, int words, int* limit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool is_aligned =
      (p.lora_rank | p.rope_dim | p.nope_dim | static_cast<int>(p.q_stride | p.q_latent_stride)) % 8 == 0;
  for (int r = warp; r < kMlaRows; r += kMlaWarps) {
    const bool is_there = r < tile.num_rows;
    const int flat = tile.row_begin + (is_there ? r : 0);
    const int64_t token = first_token + flat / p.num_heads;
    const int head = flat % p.num_heads;
    const bf16* latent = static_cast<const bf16*>(p.q_latent) +
                         ((token - p.first_token) * p.num_heads + head) * p.q_latent_stride;
    const bf16* rope =
        static_cast<const bf16*>(p.q) + token * p.q_stride + head * (p.nope_dim + p.rope_dim) + p.nope_dim;
    const int latent_end = is_there ? p.lora_rank : 0, rope_end = is_there ? p.lora_rank + p.rope_dim : 0;
    for (int word = lane; word < words; word += 32) {
      const int c0 = word * 8;
      uint4* at = reinterpret_cast<uint4*>(to + swizzled(r, word, words));
      if (is_aligned) {
        const bf16* from = c0 < latent_end ? latent + c0 : rope + (c0 - p.lora_rank);
        *at = c0 < rope_end ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
      } else {
        for (int c = c0; c < c0 + 8; ++c) {
          bf16 value = __float2bfloat16_rn(0.0f);
          if (c < rope_end) value = c < latent_end ? latent[c] : rope[c - p.lora_rank];
          reinterpret_cast<bf16*>(at)[c - c0] = value;
        }
      }
    }
    if (lane == 0) limit[r] = is_there ? p.cache_positions[token] : -1;
  }
}

}  // namespace rodin::cuda
