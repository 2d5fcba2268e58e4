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

// Warps of a block.
__host__ __device__ constexpr int mla_warps(int row_tiles) { return row_tiles == 1 ? 16 : 8; }

struct MlaShared {
  uint32_t query, keys, weights;  // shared addresses
  uint32_t key_bytes;             // of a key buffer: there are two, or with FP8 one and the raw rows
  float* row_max;                 // [16 R, 8 / R] of the warps' key tiles
  float* tile_sum;                // [16 R, 8] of the 8-key tiles
  int* limit;                     // [16 R] last position that a row attends to, -1: no such row
  float* odd_scores;              // [8, 32, 4] R = 1: the odd chains, by key tile, lane and element
};

// Of kKeys rows of an FP8 cache.
__host__ __device__ constexpr int mla_raw_bytes(int row_bytes) { return kKeys * row_bytes; }

// raw_row_bytes: of an FP8 cache, 0 for one in bf16.
constexpr int mla_shared_bytes(int row_tiles, int padded, int raw_row_bytes) {
  const int rows = 16 * row_tiles;
  const int keys = kKeys * padded * 2;
  return rows * padded * 2 + (raw_row_bytes == 0 ? 2 * keys : keys + mla_raw_bytes(raw_row_bytes)) +
         rows * kKeys * 2 + rows * (8 / row_tiles) * 4 + rows * 8 * 4 + rows * 4 +
         (row_tiles == 1 ? 8 * 32 * 4 * 4 : 0);
}

// Columns of a row in shared memory: a multiple of 64 elements, zeros behind the latent.
__device__ __forceinline__ int padded_latent(const MlaParams& p) {
  return (p.lora_rank + p.rope_dim + 63) / 64 * 64;
}

// Brings key blocks of one tile's sequence into shared memory; zeros outside [first_position, max_position].
template <int kWarps>
struct KeyLoader {
  static constexpr int kKeysEach = kKeys / kWarps;  // keys of a warp: warp, warp + kWarps, ..
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
      const int position = first + warp + kWarps * lane;
      if (position >= p.first_position && position <= max_position) {
        slot = table[position / p.block_size] * p.block_size + position % p.block_size;
      }
    }
  }

  __device__ void bring(uint32_t to) const {
    static_assert(kWarps % 8 == 0);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t row_bytes = words * 16;
    const uint32_t lane_at =
        to + warp * row_bytes + (lane ^ (warp & 7)) * 16;  // every key of a warp rotates alike
#pragma unroll
    for (int i = 0; i < kKeysEach; ++i) {
      const int key_slot = __shfl_sync(kAllLanes, slot, i);
      const bf16* row = static_cast<const bf16*>(p.cache) + (key_slot < 0 ? 0 : key_slot) * p.cache_stride;
      const uint32_t key_at = lane_at + i * kWarps * row_bytes;
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

  // FP8: the rows as they are, kKeys of them one behind the other; zeros where there is none.
  __device__ void bring_raw(char* to) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_bytes = static_cast<int>(p.cache_stride);
#pragma unroll
    for (int i = 0; i < kKeysEach; ++i) {
      const int key_slot = __shfl_sync(kAllLanes, slot, i);
      const char* row = static_cast<const char*>(p.cache) + (key_slot < 0 ? 0 : key_slot) * p.cache_stride;
      const uint32_t key_at = shared_address(to + (warp + kWarps * i) * row_bytes);
      for (int at = lane * 16; at < row_bytes; at += 512) copy_async_16(key_at + at, row + at, key_slot >= 0);
    }
  }

  // The same warp's rows, widened to bf16 in their places among the keys.
  __device__ void widen_raw(const char* from, char* to) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_bytes = static_cast<int>(p.cache_stride);
    constexpr int kWords = kMlaMaxLora / 8;  // of the latents in bf16
#pragma unroll 2
    for (int i = 0; i < kKeysEach; ++i) {
      const int key = warp + kWarps * i;
      const char* row = from + key * row_bytes;
      const uint4 packed = *reinterpret_cast<const uint4*>(row + lane * 16);  // 16 latents, all of one group
      const float scale = reinterpret_cast<const float*>(row + kMlaMaxLora)[lane * 16 / kFp8Group];
      const uint32_t raw[4] = {packed.x, packed.y, packed.z, packed.w};
      uint32_t wide[8];  // [8] pairs
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t low, high;
        widen_e4m3_word(raw[j], low, high);
        wide[2 * j] = pack_bf16(low_float(low) * scale, high_float(low) * scale);
        wide[2 * j + 1] = pack_bf16(low_float(high) * scale, high_float(high) * scale);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        *reinterpret_cast<uint4*>(to + swizzled(key, 2 * lane + j, words)) =
            make_uint4(wide[4 * j], wide[4 * j + 1], wide[4 * j + 2], wide[4 * j + 3]);
      }
      const char* rope = row + kMlaMaxLora + kMlaMaxLora / kFp8Group * 4;
      for (int word = lane; word < words - kWords; word += 32) {
        *reinterpret_cast<uint4*>(to + swizzled(key, kWords + word, words)) =
            word * 8 < p.rope_dim ? *reinterpret_cast<const uint4*>(rope + word * 16)
                                  : make_uint4(0, 0, 0, 0);
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
template <int kRows, int kWarps>
__device__ __forceinline__ void load_queries(const MlaParams& p, const MlaTile& tile, int first_token,
                                             char* to, int words, int* limit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool is_aligned =
      (p.lora_rank | p.rope_dim | p.nope_dim | static_cast<int>(p.q_stride | p.q_latent_stride)) % 8 == 0;
  for (int r = warp; r < kRows; r += kWarps) {
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
