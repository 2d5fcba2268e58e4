// Absorbed latent attention over the paged cache for the shapes that mla_wgmma.cu does not take: for each
// (token, head) row with query q = [q_nope W_UK | q_rope]
//   s_p = softmax_scale * q . latent(p),  o = sum_p softmax(s)_p latent(p)[:lora_rank]
// for decode and prefill alike, split over the keys; linear layers before and after apply W_UK and W_UV.
//
// mla_kernel: grid (tiles, splits), 16 warps. A block holds 16 rows of one sequence and walks one split in
// key blocks of 64, which pass through two swizzled shared memory buffers by asynchronous copies, one block
// ahead.
// - scores: warp w takes 8 keys in one of two chains (even and odd k16 steps), which are added at the end.
// - softmax: online, base 2. The sum of a key block is the sum of its 8-key tiles in order.
// - values: warp w takes 32 of the lora_rank columns.
// Nothing of this depends on the tile's other rows or on the chunk: a row gives the same bits in any batch.
//
// mla_combine_kernel: a block for each row adds its splits in order (few tokens: mla_heads.cu does that).
// Split sizes: mla_split_shift.
#include "cuda/mla_combine.cuh"
#include "cuda/mla_tile.cuh"

namespace rodin::cuda {
namespace {

__global__ void __launch_bounds__(32 * kMlaWarps, 1) mla_kernel(const __grid_constant__ MlaParams p) {
  constexpr int kKeyWarps = kMlaWarps / 2;                  // and as many for the odd chains
  constexpr int kValueTiles = kMlaMaxLora / 8 / kMlaWarps;  // 8-column tiles of a warp
  extern __shared__ __align__(128) char shared[];

  let_successor_begin();
  const MlaTile tile = p.tiles[blockIdx.x];
  const int split = blockIdx.y;
  const int split_begin = split << tile.split_shift;
  if (split_begin > tile.max_position) return;
  const int split_end = min(split_begin + (1 << tile.split_shift), tile.max_position + 1);
  const int padded = padded_latent(p);
  const int words = padded / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int key_warp = warp % kKeyWarps;
  const bool is_odd_warp = warp >= kKeyWarps;

  MlaShared s;
  s.query = shared_address(shared);
  s.keys = s.query + kMlaRows * padded * 2;
  s.key_bytes = kKeys * padded * 2;
  s.weights = s.keys + 2 * s.key_bytes;
  s.row_max = reinterpret_cast<float*>(shared + (s.weights - s.query) + kMlaRows * kKeys * 2);
  s.tile_sum = s.row_max + kMlaRows * kKeyWarps;
  s.limit = reinterpret_cast<int*>(s.tile_sum + kMlaRows * 8);
  s.odd_scores = reinterpret_cast<float*>(s.limit + kMlaRows);

  const int latent = p.lora_rank + p.rope_dim;
  KeyLoader loader = {p,
                      p.block_table + p.block_table_start[tile.seq],
                      tile.max_position,
                      latent,
                      words,
                      latent % 8 == 0 && p.cache_stride % 8 == 0,
                      -1};
  const auto bring = [&](int first, int buffer) {
    if (first < split_end) loader.bring(s.keys + buffer * s.key_bytes);
    copy_async_commit();
  };
  // Keys that earlier steps wrote come before the kernel ahead has ended.
  const int first_token = p.q_start[tile.seq];
  const int first_new = p.cache_positions[first_token];
  const bool is_early[2] = {split_begin + kKeys <= first_new,
                            split_begin + 2 * kKeys <= first_new};  // of the first two key blocks
  loader.find_slots(split_begin);
  if (is_early[0]) {
    bring(split_begin, 0);
    loader.find_slots(split_begin + kKeys);
    if (is_early[1]) bring(split_begin + kKeys, 1);
  }
  wait_for_predecessor();
  if (!is_early[0]) {
    bring(split_begin, 0);
    loader.find_slots(split_begin + kKeys);
  }
  if (!is_early[1]) bring(split_begin + kKeys, 1);

  load_queries(p, tile, first_token, shared, words, s.limit);
  __syncthreads();
  const int limits[2] = {s.limit[g], s.limit[g + 8]};

  const float scale = p.softmax_scale * 1.4426950408889634f;  // into base 2
  const int value_tiles = (p.lora_rank + 7) / 8;
  float out[kValueTiles][4] = {};  // [kValueTiles, 4]
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0, 0};

  // ldmatrix addresses: lane i gives row i % 8 of matrix i / 8. Words are rotated within groups of 8: the
  // places of a group's words for this lane, to which the group's offset (128 bytes each) is added.
  const int matrix = lane / 8, matrix_row = lane % 8;
  const uint32_t row_bytes = words * 16;
  const uint32_t query_at = s.query + (matrix_row + matrix % 2 * 8) * row_bytes;
  uint32_t query_word[4];  // [4] of each k16 step of 64 columns
#pragma unroll
  for (int i = 0; i < 4; ++i) query_word[i] = query_at + ((2 * i + matrix / 2) ^ matrix_row) * 16;
  const uint32_t key_row = (8 * key_warp + matrix_row) * row_bytes;
  // The same for a warp that has one chain only: steps 0 and 2 of 64 columns, or 1 and 3.
  const uint32_t chain_query[2] = {is_odd_warp ? query_word[1] : query_word[0],
                                   is_odd_warp ? query_word[3] : query_word[2]};
  const uint32_t chain_key =
      key_row + ((matrix / 2 * 4 + (is_odd_warp ? 2 : 0) + matrix % 2) ^ matrix_row) * 16;
  const uint32_t value_row = (matrix_row + matrix % 2 * 8) * row_bytes;

  for (int first = split_begin, buffer = 0; first < split_end; first += kKeys, buffer ^= 1) {
    const uint32_t keys = s.keys + buffer * s.key_bytes;
    copy_async_wait<1>();
    __syncthreads();  // this block has arrived; the next one is on its way
    loader.find_slots(first + 2 * kKeys);

    // Scores of 16 rows and 8 keys, one chain a warp: its two steps of each 64 columns.
    float score[4] = {};  // [4]
#pragma unroll 3
    for (int group = 0; group < words / 8; ++group) {
      uint32_t a[2][4], b[4];  // b: matrices of the first step, then of the second
      load_matrix_x4(a[0], chain_query[0] + group * 128);
      load_matrix_x4(a[1], chain_query[1] + group * 128);
      load_matrix_x4(b, keys + chain_key + group * 128);
      mma(score, a[0], b[0], b[1]);
      mma(score, a[1], b[2], b[3]);
    }
    float4* odd = reinterpret_cast<float4*>(s.odd_scores) + key_warp * 32 + lane;
    if (is_odd_warp) *odd = make_float4(score[0], score[1], score[2], score[3]);
    __syncthreads();
    const float4 odd_score = *odd;
    const float other[4] = {odd_score.x, odd_score.y, odd_score.z, odd_score.w};

    float block_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int position = first + 8 * key_warp + 2 * t + c % 2;
      const bool is_seen = position >= p.first_position && position <= limits[c / 2];
      score[c] = is_seen ? (score[c] + other[c]) * scale : -INFINITY;
      block_max[c / 2] = fmaxf(block_max[c / 2], score[c]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      block_max[half] = fmaxf(block_max[half], __shfl_xor_sync(kAllLanes, block_max[half], 1));
      block_max[half] = fmaxf(block_max[half], __shfl_xor_sync(kAllLanes, block_max[half], 2));
      if (t == 0 && !is_odd_warp) s.row_max[(g + 8 * half) * kKeyWarps + key_warp] = block_max[half];
    }
    __syncthreads();

    float shrink[2];  // [2]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = row_max[half];
#pragma unroll
      for (int w = 0; w < kKeyWarps; ++w) max = fmaxf(max, s.row_max[(g + 8 * half) * kKeyWarps + w]);
      shrink[half] = max == -INFINITY ? 1.0f : exp2f(row_max[half] - max);
      row_max[half] = max;
    }
    if (!is_odd_warp) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = g + 8 * half;
        const float a = row_max[half] == -INFINITY ? 0.0f : exp2f(score[2 * half] - row_max[half]);
        const float b = row_max[half] == -INFINITY ? 0.0f : exp2f(score[2 * half + 1] - row_max[half]);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(s.weights + swizzled(row, key_warp, kKeys / 8) + t * 4),
                     "r"(pack_bf16(a, b))
                     : "memory");
        float sum = a + b;
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (t == 0) s.tile_sum[row * 8 + key_warp] = sum;
      }
    }
    __syncthreads();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += s.tile_sum[(g + 8 * half) * 8 + i];
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
      load_matrix_x4(a, s.weights + swizzled(matrix_row + matrix % 2 * 8, 2 * step + matrix / 2, kKeys / 8));
#pragma unroll
      for (int n = 0; n < kValueTiles; n += 2) {
        const int value_tile = warp * kValueTiles + n;
        if (value_tile >= value_tiles) break;
        uint32_t b[4];  // keys 0-7 and 8-15 of this column tile, then of the next
        load_matrix_x4_trans(
            b, keys + value_row + 16 * step * row_bytes + ((value_tile + matrix / 2) ^ matrix_row) * 16);
        mma(out[n], a, b[0], b[1]);
        mma(out[n + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();  // everybody is done with this buffer
    bring(first + 2 * kKeys, buffer);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (limits[half] < split_begin) continue;  // this row has no such split
    const int flat = tile.row_begin + g + 8 * half;
    const int64_t row = static_cast<int64_t>(first_token - p.first_token) * p.num_heads + flat;
    const int64_t at = row * p.max_splits + split;
    float* partial = p.partial + at * p.lora_rank;
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
      const int column = (warp * kValueTiles + n) * 8 + 2 * t;
      if (column < p.lora_rank) partial[column] = out[n][2 * half];
      if (column + 1 < p.lora_rank) partial[column + 1] = out[n][2 * half + 1];
    }
    if (warp == 0 && t == 0) {
      p.partial_ml[2 * at] = row_max[half];
      p.partial_ml[2 * at + 1] = row_sum[half];
    }
  }
}

__global__ void __launch_bounds__(kCombineQuads) mla_combine_kernel(const __grid_constant__ MlaParams p) {
  let_successor_begin();
  wait_for_predecessor();
  const int64_t row = blockIdx.x;  // token * A + head of the chunk
  const int position = p.cache_positions[p.first_token + row / p.num_heads];
  const float4 out = combine_splits<kCombineQuads>(p, row, position, nullptr);
  bf16* to = static_cast<bf16*>(p.out) + row * p.out_stride + 4 * threadIdx.x;
  const float values[4] = {out.x, out.y, out.z, out.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (4 * static_cast<int>(threadIdx.x) + i < p.lora_rank) to[i] = __float2bfloat16_rn(values[i]);
}

}  // namespace

void run_mla_attention(const MlaParams& params, cudaStream_t stream) {
  if (params.num_tiles == 0) return;
  const int padded = (params.lora_rank + params.rope_dim + 63) / 64 * 64;
  launch_overlapped(
      mla_kernel, dim3(static_cast<unsigned>(params.num_tiles), static_cast<unsigned>(params.max_splits)),
      32 * kMlaWarps, static_cast<size_t>(mla_shared_bytes(padded)), stream, params, "mla_kernel");
}

void run_mla_combine(const MlaParams& params, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(params.num_tokens) * params.num_heads;
  if (rows == 0) return;
  launch_overlapped(mla_combine_kernel, dim3(static_cast<unsigned>(rows)), kCombineQuads, 0, stream, params,
                    "mla_combine_kernel");
}

void prepare_mla() {
  static_assert(mla_shared_bytes(kMlaMaxLatent) <= 232448);
  raise_shared_limit(mla_kernel, mla_shared_bytes(kMlaMaxLatent));
}

}  // namespace rodin::cuda
