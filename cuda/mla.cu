// Absorbed latent attention over the paged cache: for each (token, head) row with query q = [q_nope W_UK | q_rope]
//   s_p = softmax_scale * q . latent(p),  o = sum_p softmax(s)_p latent(p)[:lora_rank]
// for decode and prefill alike, split over the keys; linear layers before and after apply W_UK and W_UV.
//
// mla_kernel: grid (tiles, splits), 8 warps. A block holds 16 R rows (R = row_tiles) of one sequence and walks one
// split in key blocks of 64, which arrive through two swizzled shared memory buffers by asynchronous copies.
//   scores  warp w: rows 16 (w % R), keys in R tiles of 8; two chains (even and odd k16 steps) added at the end
//   softmax online, base 2; the sum of a key block is the sum of its 8-key tiles in order
//   values  warp w: the same rows, lora_rank columns in tiles of 8: tile w / R * 8 R on
// Nothing of this depends on R, on the tile's other rows or on the chunk: a row gives the same bits in any batch.
// mla_combine_kernel: a block for each row adds its splits in order. Split sizes: mla_split_shift.
#include "cuda/common.cuh"

namespace rodin::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = kMlaKeyBlock;

// Byte offset of 16-byte word `word` of row `row` in a tile of `words` words a row (a multiple of 8): within
// each 8 words the place is rotated by the row, so that 8 rows of one word lie in 8 different bank groups.
__device__ __forceinline__ uint32_t swizzled(int row, int word, int words) {
  return static_cast<uint32_t>(row * words + (word ^ (row & 7))) * 16;
}

struct MlaShared {
  uint32_t query, keys, weights;  // shared addresses
  uint32_t key_bytes;             // of one of the two key buffers
  float* row_max;                 // [16 R, kWarps] of the warps' key tiles
  float* tile_sum;                // [16 R, 8] of the 8-key tiles
  int* limit;                     // [16 R] last position that a row attends to, -1: no such row
};

constexpr int shared_bytes(int row_tiles, int padded) {
  const int rows = 16 * row_tiles;
  return rows * padded * 2 + 2 * kKeys * padded * 2 + rows * kKeys * 2 + rows * (8 / row_tiles) * 4 + rows * 8 * 4 +
         rows * 4;
}

// Columns of a row in shared memory: a multiple of 64 elements, zeros behind the latent.
__device__ __forceinline__ int padded_latent(const MlaParams& p) { return (p.lora_rank + p.rope_dim + 63) / 64 * 64; }

// Brings key block `first .. first + 63` of the tile's sequence; zeros outside [first_position, max_position].
__device__ __forceinline__ void bring_keys(const MlaParams& p, const MlaTile& tile, int first, uint32_t to,
                                           int padded) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int words = padded / 8;
  const int latent = p.lora_rank + p.rope_dim;
  const int32_t* table = p.block_table + p.block_table_start[tile.seq];
  // Lane i < 8 looks up the slot of this warp's i-th key.
  int slot = -1;
  if (lane < kKeys / kWarps) {
    const int position = first + warp + kWarps * lane;
    if (position >= p.first_position && position <= tile.max_position) {
      slot = table[position / p.block_size] * p.block_size + position % p.block_size;
    }
  }
  const bool is_aligned = latent % 8 == 0 && p.cache_stride % 8 == 0;
#pragma unroll
  for (int i = 0; i < kKeys / kWarps; ++i) {
    const int key = warp + kWarps * i;
    const int64_t key_slot = __shfl_sync(kAllLanes, slot, i);
    const bf16* row = static_cast<const bf16*>(p.cache) + (key_slot < 0 ? 0 : key_slot) * p.cache_stride;
    for (int word = lane; word < words; word += 32) {
      const uint32_t at = to + swizzled(key, word, words);
      if (is_aligned) {
        const bool is_there = key_slot >= 0 && word * 8 < latent;
        copy_async_16(at, is_there ? row + word * 8 : row, is_there);
      } else {
        uint16_t values[8];  // [8]
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          values[j] = key_slot >= 0 && word * 8 + j < latent ? reinterpret_cast<const uint16_t*>(row)[word * 8 + j] : 0;
        }
        const uint4 v = *reinterpret_cast<const uint4*>(values);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
      }
    }
  }
}

template <int R>
__global__ void __launch_bounds__(kThreads, 1) mla_kernel(const __grid_constant__ MlaParams p) {
  constexpr int kRows = 16 * R;
  constexpr int kColumnWarps = kWarps / R;          // warps that share a row tile
  constexpr int kValueTiles = kMlaMaxLora / 8 / kColumnWarps;  // 8-column tiles of a warp: 8 R
  extern __shared__ __align__(128) char shared[];

  const MlaTile tile = p.tiles[blockIdx.x];
  const int split = blockIdx.y;
  const int split_begin = split << tile.split_shift;
  if (split_begin > tile.max_position) return;
  const int split_end = min(split_begin + (1 << tile.split_shift), tile.max_position + 1);
  const int padded = padded_latent(p);
  const int words = padded / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int row_tile = warp % R, column_warp = warp / R;

  MlaShared s;
  s.query = shared_address(shared);
  s.keys = s.query + kRows * padded * 2;
  s.key_bytes = kKeys * padded * 2;
  s.weights = s.keys + 2 * s.key_bytes;
  s.row_max = reinterpret_cast<float*>(shared + (s.weights - s.query) + kRows * kKeys * 2);
  s.tile_sum = s.row_max + kRows * kColumnWarps;
  s.limit = reinterpret_cast<int*>(s.tile_sum + kRows * 8);

  bring_keys(p, tile, split_begin, s.keys, padded);
  copy_async_commit();

  // Queries: row r is row tile.row_begin + r of the sequence's [q_len, A].
  const int first_token = p.q_start[tile.seq];
  for (int r = warp; r < kRows; r += kWarps) {
    const bool is_there = r < tile.num_rows;
    const int flat = tile.row_begin + (is_there ? r : 0);
    const int64_t token = first_token + flat / p.num_heads;
    const int head = flat % p.num_heads;
    const bf16* latent = static_cast<const bf16*>(p.q_latent) +
                         ((token - p.first_token) * p.num_heads + head) * p.q_latent_stride;
    const bf16* rope =
        static_cast<const bf16*>(p.q) + token * p.q_stride + head * (p.nope_dim + p.rope_dim) + p.nope_dim;
    for (int c = lane; c < padded; c += 32) {
      bf16 value = __float2bfloat16_rn(0.0f);
      if (is_there && c < p.lora_rank) {
        value = latent[c];
      } else if (is_there && c < p.lora_rank + p.rope_dim) {
        value = rope[c - p.lora_rank];
      }
      *reinterpret_cast<bf16*>(shared + swizzled(r, c / 8, words) + c % 8 * 2) = value;
    }
    if (lane == 0) s.limit[r] = is_there ? p.cache_positions[token] : -1;
  }
  __syncthreads();
  const int limits[2] = {s.limit[16 * row_tile + g], s.limit[16 * row_tile + g + 8]};

  const float scale = p.softmax_scale * 1.4426950408889634f;  // into base 2
  const int num_steps = (p.lora_rank + p.rope_dim + 31) / 32 * 2;  // k16 steps of a score, even
  const int value_tiles = (p.lora_rank + 7) / 8;
  float out[kValueTiles][4] = {};  // [kValueTiles, 4]
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0, 0};

  // ldmatrix addresses: lane i gives row i % 8 of matrix i / 8.
  const int matrix = lane / 8, matrix_row = lane % 8;
  for (int first = split_begin, buffer = 0; first < split_end; first += kKeys, buffer ^= 1) {
    const uint32_t keys = s.keys + buffer * s.key_bytes;
    copy_async_wait<0>();
    __syncthreads();  // this block has arrived; the other buffer is free
    if (first + kKeys < split_end) bring_keys(p, tile, first + kKeys, s.keys + (buffer ^ 1) * s.key_bytes, padded);
    copy_async_commit();

    // Scores of 16 rows and R tiles of 8 keys; even and odd steps apart.
    float score[R][2][4] = {};  // [R, 2, 4]
    for (int step = 0; step < num_steps; step += 2) {
      uint32_t a[2][4];  // [2, 4]
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        load_matrix_x4(a[odd], s.query + swizzled(16 * row_tile + matrix_row + matrix % 2 * 8,
                                                  2 * (step + odd) + matrix / 2, words));
      }
#pragma unroll
      for (int n = 0; n < R; ++n) {
        uint32_t b[4];  // matrices: step's two halves, then the odd step's
        load_matrix_x4(b, keys + swizzled(8 * (column_warp * R + n) + matrix_row, 2 * step + matrix, words));
        mma(score[n][0], a[0], b[0], b[1]);
        mma(score[n][1], a[1], b[2], b[3]);
      }
    }

    float block_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < R; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int position = first + 8 * (column_warp * R + n) + 2 * t + c % 2;
        const bool is_seen = position >= p.first_position && position <= limits[c / 2];
        score[n][0][c] = is_seen ? (score[n][0][c] + score[n][1][c]) * scale : -INFINITY;
        block_max[c / 2] = fmaxf(block_max[c / 2], score[n][0][c]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      block_max[half] = fmaxf(block_max[half], __shfl_xor_sync(kAllLanes, block_max[half], 1));
      block_max[half] = fmaxf(block_max[half], __shfl_xor_sync(kAllLanes, block_max[half], 2));
      if (t == 0) s.row_max[(16 * row_tile + g + 8 * half) * kColumnWarps + column_warp] = block_max[half];
    }
    __syncthreads();

    float shrink[2];  // [2]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = row_max[half];
#pragma unroll
      for (int w = 0; w < kColumnWarps; ++w) {
        max = fmaxf(max, s.row_max[(16 * row_tile + g + 8 * half) * kColumnWarps + w]);
      }
      shrink[half] = max == -INFINITY ? 1.0f : exp2f(row_max[half] - max);
      row_max[half] = max;
    }
#pragma unroll
    for (int n = 0; n < R; ++n) {
      const int key_tile = column_warp * R + n;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * row_tile + g + 8 * half;
        const float a = row_max[half] == -INFINITY ? 0.0f : exp2f(score[n][0][2 * half] - row_max[half]);
        const float b = row_max[half] == -INFINITY ? 0.0f : exp2f(score[n][0][2 * half + 1] - row_max[half]);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(s.weights + swizzled(row, key_tile, kKeys / 8) + t * 4),
                     "r"(pack_bf16(a, b))
                     : "memory");
        float sum = a + b;
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (t == 0) s.tile_sum[row * 8 + key_tile] = sum;
      }
    }
    __syncthreads();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += s.tile_sum[(16 * row_tile + g + 8 * half) * 8 + i];
      row_sum[half] = row_sum[half] * shrink[half] + sum;
    }
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
      out[n][0] *= shrink[0], out[n][1] *= shrink[0];
      out[n][2] *= shrink[1], out[n][3] *= shrink[1];
    }
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t a[4];
      load_matrix_x4(a, s.weights + swizzled(16 * row_tile + matrix_row + matrix % 2 * 8, 2 * step + matrix / 2,
                                             kKeys / 8));
#pragma unroll
      for (int n = 0; n < kValueTiles; n += 2) {
        const int value_tile = column_warp * kValueTiles + n;
        if (value_tile >= value_tiles) break;
        uint32_t b[4];  // keys 0-7 and 8-15 of this column tile, then of the next
        load_matrix_x4_trans(b, keys + swizzled(16 * step + matrix_row + matrix % 2 * 8, value_tile + matrix / 2, words));
        mma(out[n], a, b[0], b[1]);
        mma(out[n + 1], a, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (limits[half] < split_begin) continue;  // this row has no such split
    const int flat = tile.row_begin + 16 * row_tile + g + 8 * half;
    const int64_t row = static_cast<int64_t>(first_token - p.first_token) * p.num_heads + flat;
    const int64_t at = row * p.max_splits + split;
    float* partial = p.partial + at * p.lora_rank;
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
      const int column = (column_warp * kValueTiles + n) * 8 + 2 * t;
      if (column < p.lora_rank) partial[column] = out[n][2 * half];
      if (column + 1 < p.lora_rank) partial[column + 1] = out[n][2 * half + 1];
    }
    if (column_warp == 0 && t == 0) {
      p.partial_ml[2 * at] = row_max[half];
      p.partial_ml[2 * at + 1] = row_sum[half];
    }
  }
}

constexpr int kCombineThreads = 128;

__global__ void __launch_bounds__(kCombineThreads) mla_combine_kernel(const __grid_constant__ MlaParams p) {
  const int64_t row = blockIdx.x;  // token * A + head of the chunk
  const int position = p.cache_positions[p.first_token + row / p.num_heads];
  const int num_splits = (position >> mla_split_shift(position)) + 1;
  const float* ml = p.partial_ml + row * p.max_splits * 2;
  float max = -INFINITY;
  for (int i = 0; i < num_splits; ++i) max = fmaxf(max, ml[2 * i]);
  float sum = 0;
  float out[kMlaMaxLora / kCombineThreads] = {};
  for (int i = 0; i < num_splits; ++i) {
    const float weight = max == -INFINITY ? 0.0f : exp2f(ml[2 * i] - max);
    sum += ml[2 * i + 1] * weight;
    const float* partial = p.partial + (row * p.max_splits + i) * p.lora_rank;
#pragma unroll
    for (int j = 0; j < kMlaMaxLora / kCombineThreads; ++j) {
      const int c = threadIdx.x + j * kCombineThreads;
      if (c < p.lora_rank) out[j] += partial[c] * weight;
    }
  }
  bf16* to = static_cast<bf16*>(p.out) + row * p.out_stride;
#pragma unroll
  for (int j = 0; j < kMlaMaxLora / kCombineThreads; ++j) {
    const int c = threadIdx.x + j * kCombineThreads;
    if (c < p.lora_rank) to[c] = __float2bfloat16_rn(sum > 0 ? out[j] / sum : out[j]);
  }
}

template <int R>
void launch(const MlaParams& p, cudaStream_t stream) {
  const int padded = (p.lora_rank + p.rope_dim + 63) / 64 * 64;
  const dim3 grid(static_cast<unsigned>(p.num_tiles), static_cast<unsigned>(p.max_splits));
  mla_kernel<R><<<grid, kThreads, static_cast<size_t>(shared_bytes(R, padded)), stream>>>(p);
  RODIN_CHECK_LAUNCH("mla_kernel");
}

template <int R>
void raise_limit() {
  RODIN_CUDA(cudaFuncSetAttribute(mla_kernel<R>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared_bytes(R, kMlaMaxLatent)));
}

}  // namespace

void run_mla_attention(const MlaParams& params, cudaStream_t stream) {
  if (params.num_tiles == 0) return;
  if (params.row_tiles == 1) {
    launch<1>(params, stream);
  } else if (params.row_tiles == 2) {
    launch<2>(params, stream);
  } else {
    launch<4>(params, stream);
  }
}

void run_mla_combine(const MlaParams& params, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(params.num_tokens) * params.num_heads;
  if (rows == 0) return;
  mla_combine_kernel<<<static_cast<unsigned>(rows), kCombineThreads, 0, stream>>>(params);
  RODIN_CHECK_LAUNCH("mla_combine_kernel");
}

void prepare_mla() {
  static_assert(shared_bytes(4, kMlaMaxLatent) <= 232448);
  raise_limit<1>();
  raise_limit<2>();
  raise_limit<4>();
}

}  // namespace rodin::cuda
