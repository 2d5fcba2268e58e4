// Shared memory of mla_fp8.cu, its keys and queries, and the fragments of products that e4m3 becomes.
#pragma once

#include "cuda/mla_scores.cuh"

namespace rodin::cuda {

constexpr int kFp8Groups = kMlaMaxLora / kFp8Group;
constexpr int kFp8Rope = kMlaMaxLora + kFp8Groups * 4;       // bytes of a row before its rotary part
constexpr int kFp8RowBytes = kFp8Rope + kMlaBoxColumns * 2;  // at most
constexpr int kFp8Stages = 4;

// N: rows of a tile. Bytes of shared memory, from `base` on, which is a multiple of 1024.
template <int N>
struct MlaFp8Layout {
  static constexpr int kQueryBox = N * 128;
  static constexpr int kWeightBytes = N * kKeys * 2;
  static constexpr int kStageBytes = kKeys * kFp8RowBytes;

  static constexpr int kWeights = kBoxes * kQueryBox;
  static constexpr int kRaw = kWeights + kFp8Groups * kWeightBytes;
  static constexpr int kWarpMax = kRaw + kFp8Stages * kStageBytes;
  static constexpr int kShrink = kWarpMax + 2 * 4 * N * 4;
  static constexpr int kColumnScale = kShrink + N * 4;
  static constexpr int kBarriers = kColumnScale + N * 4;
  static constexpr int kBytes = kBarriers + (2 * kFp8Stages + 4) * 8;
  static_assert(kBytes <= kSharedLimit && kRaw % 1024 == 0);

  uint32_t base;

  __device__ uint32_t queries(int place) const { return base + place * kQueryBox; }
  // f16 [N, kKeys] of the softmax, times the keys' scales of one group.
  __device__ uint32_t weights(int group) const { return base + kWeights + group * kWeightBytes; }
  __device__ uint32_t raw(int stage) const { return base + kRaw + stage * kStageBytes; }
  // float32 [2, 4, N], used in turn; [N]; [N]
  __device__ uint32_t warp_max(int which) const { return base + kWarpMax + which * 16 * N; }
  __device__ uint32_t shrink() const { return base + kShrink; }
  __device__ uint32_t column_scale() const { return base + kColumnScale; }
  __device__ uint32_t raw_full(int stage) const { return base + kBarriers + 16 * stage; }
  __device__ uint32_t raw_empty(int stage) const { return raw_full(stage) + 8; }
  __device__ uint32_t queries_full() const { return raw_full(kFp8Stages); }
  __device__ uint32_t queries_empty() const { return queries_full() + 8; }
  __device__ uint32_t weights_full() const { return queries_full() + 16; }
  __device__ uint32_t weights_empty() const { return queries_full() + 24; }
};

// Bytes 0 and 1, bytes 2 and 3 of a word of e4m3 values as f16.
__device__ __forceinline__ void halves_of_e4m3(uint32_t word, uint32_t& low, uint32_t& high) {
  asm("{\n.reg .b16 first, second;\nmov.b32 {first, second}, %2;\ncvt.rn.f16x2.e4m3x2 %0, first;\n"
      "cvt.rn.f16x2.e4m3x2 %1, second;\n}"
      : "=r"(low), "=r"(high)
      : "r"(word));
}

// One warp: the raw rows of all items into the stages.
template <int N>
__device__ __forceinline__ void bring_rows(const MlaWgmmaParams& p, const MlaFp8Layout<N>& at) {
  const int rows = p.piece_rows;
  const auto row_bytes = static_cast<int>(p.mla.cache_stride);
  Ring<kFp8Stages> ring;
  for_key_blocks(p, [&](MlaPieces& pieces, const MlaItem& item, int first_piece, int count) {
    const int num_pieces = (count + rows - 1) / rows;
    barrier_wait(at.raw_empty(ring.place), ring.parity ^ 1);
    __syncwarp();  // lanes that leave the wait one by one would elect one each
    if (is_elected()) barrier_expect(at.raw_full(ring.place), count * row_bytes);
    __syncwarp();
    for (int i = 0; i < num_pieces; ++i) {
      if (first_piece + i > 0 && (first_piece + i) % 32 == 0) pieces.find(item, first_piece + i);
      const int slot = __shfl_sync(kAllLanes, pieces.slots, (first_piece + i) % 32);
      if (is_elected()) {
        copy_bulk(at.raw(ring.place) + i * rows * row_bytes,
                  static_cast<const char*>(p.mla.cache) + static_cast<int64_t>(slot) * row_bytes,
                  min(rows, count - i * rows) * row_bytes, at.raw_full(ring.place));
      }
    }
    ring.next();
  });
}

// One warpgroup: queries as the products take them. A row's latents become f16, times a power of two that
// brings the largest of them below 2^15, so that bf16's bits are kept; its rotary part is multiplied by it
// too. Of 16 latents, pairs 0, 2, 4 and 6 come first, as a lane finds them in a word of e4m3 keys.
template <int N>
__device__ __forceinline__ void prepare_queries(const MlaFp8Layout<N>& at, float scale) {
  constexpr int kParts = 128 / N;  // threads of a row
  const int row = threadIdx.x % 128 / kParts, part = threadIdx.x % kParts;
  const auto word_at = [&](int place, int word) {
    return at.queries(place) + row * 128 + (word ^ (row & 7)) * 16;
  };
  constexpr int kGroupsEach = kMlaMaxLora / 16 / kParts;  // of 16 latents
  uint32_t most = 0;                                      // bits of a magnitude
#pragma unroll
  for (int i = 0; i < kGroupsEach; ++i) {
    const int group = part + i * kParts;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = load_shared(word_at(1 + group / 4, group % 4 * 2 + half));
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) most = max(most, max(pairs[j] & 0x7fff, pairs[j] >> 16 & 0x7fff));
    }
  }
#pragma unroll
  for (int bit = kParts / 2; bit > 0; bit /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, bit));
  const int exponent = static_cast<int>(most >> 7);  // 0: nothing to scale; 255: not finite
  const int shift = exponent == 0 || exponent == 255 ? 0 : min(127 + 14 - exponent, 60);
  const float up = __int_as_float((127 + shift) << 23);
#pragma unroll
  for (int i = 0; i < kGroupsEach; ++i) {
    const int group = part + i * kParts, word = group % 4 * 2;
    const uint4 low = load_shared(word_at(1 + group / 4, word));
    const uint4 high = load_shared(word_at(1 + group / 4, word + 1));
    const uint32_t pairs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    uint32_t out[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const __half2 scaled = __floats2half2_rn(low_float(pairs[j]) * up, high_float(pairs[j]) * up);
      out[j % 2 * 4 + j / 2] = *reinterpret_cast<const uint32_t*>(&scaled);
    }
    store_shared(word_at(1 + group / 4, word), make_uint4(out[0], out[1], out[2], out[3]));
    store_shared(word_at(1 + group / 4, word + 1), make_uint4(out[4], out[5], out[6], out[7]));
  }
#pragma unroll
  for (int word = part; word < 8; word += kParts) {
    const uint4 v = load_shared(word_at(0, word));
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = pack_bf16(low_float(pairs[j]) * up, high_float(pairs[j]) * up);
    store_shared(word_at(0, word), make_uint4(out[0], out[1], out[2], out[3]));
  }
  if (part == 0) store_shared_float(at.column_scale() + row * 4, scale / up);
  shared_fence();
  group_sync<kScoresBarrier, 128>();
}

// One warpgroup: zeros in place of a stage's rows that nobody attends to. They have a weight of 0, but may
// hold anything.
template <int N>
__device__ __forceinline__ void clear_rows(const MlaParams& p, const MlaFp8Layout<N>& at, const MlaItem& item,
                                           int first, int stage) {
  const int begin = max(p.first_position - first, 0), end = min(item.end - first, kKeys);
  const int words = static_cast<int>(p.cache_stride) / 16;
  for (int i = threadIdx.x % 128; i < kKeys * words; i += 128) {
    const int row = i / words;
    if (row < begin || row >= end) store_shared(at.raw(stage) + i * 16, make_uint4(0, 0, 0, 0));
  }
  shared_fence();
  group_sync<kScoresBarrier, 128>();
}

// d = a b^T (+ d): a [64, 16] in registers, as the rows of mma() in common.cuh with 16 rows for each warp; b
// [N, 16] in shared memory; of f16 or bf16.
template <int N, bool kHalf>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                                int is_added) {
  static_assert(N == 16 || N == 32);
#define RODIN_WGMMA_16(types)                                                                          \
  asm volatile(                                                                                        \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." types                                              \
      " {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1, 0;\n}\n"                   \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(is_added))
#define RODIN_WGMMA_32(types)                                                                                \
  asm volatile(                                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." types                                                    \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, " \
      "p, 1, 1, 0;\n}\n"                                                                                     \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),      \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(is_added))
  if constexpr (N == 16 && kHalf) RODIN_WGMMA_16("f16.f16");
  if constexpr (N == 16 && !kHalf) RODIN_WGMMA_16("bf16.bf16");
  if constexpr (N == 32 && kHalf) RODIN_WGMMA_32("f16.f16");
  if constexpr (N == 32 && !kHalf) RODIN_WGMMA_32("bf16.bf16");
#undef RODIN_WGMMA_16
#undef RODIN_WGMMA_32
}

}  // namespace rodin::cuda
