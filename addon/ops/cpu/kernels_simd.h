// V: a vector of kLanes floats, for the instruction path this translation unit is compiled for. Everything
// has internal linkage (see kernels.h).
//
// fma is fused where the path has it; the portable path rounds the product. hsum adds lanes i and i +
// kLanes/2, then halves again: reduce() gives the same bits for many vectors at once.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops/cpu/convert.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rodin {
namespace {

// Copies n < 16 elements of `bytes` bytes into a zeroed buffer of 64 bytes: the tail of a row.
[[maybe_unused]] inline void copy_tail(const char* from, int64_t bytes, char* buffer) {
  memset(buffer, 0, 64);
  memcpy(buffer, from, static_cast<size_t>(bytes));
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

constexpr const char* kPathName = "avx512";
using V = __m512;
constexpr int64_t kLanes = 16;
constexpr int kAccumulators = 16;  // vectors that stay in registers beside their operands
constexpr int kTileTokens = 4;

inline V zero() { return _mm512_setzero_ps(); }
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// A NaN in b stays.
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V round(V a) { return _mm512_roundscale_ps(a, 0x08); }
// 2^n for integral n in -126 .. 127.
inline V exp2_of_int(V n) {
  const __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(i, 23));
}
inline V load_bf16(const char* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline V load_f16(const char* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
}
// e4m3 with its bits shifted into those of f16 is the value * 2^-8, denormals included.
inline V load_e4m3(const char* p) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i half =
      _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  return _mm512_cvtph_ps(half);
}
constexpr float kE4m3Factor = 256.0f;

inline float hsum(V v) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
inline float hmax(V v) { return _mm512_reduce_max_ps(v); }

// out[i] = hsum(v[i]) for i in 0 .. 15.
inline void reduce(const V* v, float* out) {
  __m512 a[8];  // [8] of two halves: v[2i] folded once, v[2i+1] folded once
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                         _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
  }
  __m512 b[4];  // [4] of four quarters: v[4i .. 4i+3] folded twice
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
  }
  __m512 c[2];  // quarter q: [b0 folded lane 0, b1 lane 0, b0 lane 1, b1 lane 1]
  for (int i = 0; i < 2; ++i) {
    c[i] =
        _mm512_add_ps(_mm512_unpacklo_ps(b[2 * i], b[2 * i + 1]), _mm512_unpackhi_ps(b[2 * i], b[2 * i + 1]));
  }
  const __m512d c0 = _mm512_castps_pd(c[0]);
  const __m512d c1 = _mm512_castps_pd(c[1]);
  const __m512 sums = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c0, c1)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(c0, c1)));
  // lane 4q + i holds v[4i + q]
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(order, sums));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr const char* kPathName = "avx2";
using V = __m256;
constexpr int64_t kLanes = 8;
constexpr int kAccumulators = 8;
constexpr int kTileTokens = 2;

inline V zero() { return _mm256_setzero_ps(); }
inline V set1(float x) { return _mm256_set1_ps(x); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V round(V a) { return _mm256_round_ps(a, 0x08); }
inline V exp2_of_int(V n) {
  const __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(i, 23));
}
inline V load_bf16(const char* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline V load_f16(const char* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_f16(uint16_t* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
}
inline V load_e4m3(const char* p) {
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
  return _mm256_cvtph_ps(half);
}
constexpr float kE4m3Factor = 256.0f;

inline float hsum(V v) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
inline float hmax(V v) {
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps(d, d, 1)));
}

// out[i] = hsum(v[i]) for i in 0 .. 7.
inline void reduce(const V* v, float* out) {
  __m256 a[4];  // [4] of two halves: v[i] folded once, v[i + 4] folded once
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm256_add_ps(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20),
                         _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
  }
  __m256 b[2];  // half h: [a0 folded lane 0, a1 lane 0, a0 lane 1, a1 lane 1]
  for (int i = 0; i < 2; ++i) {
    b[i] =
        _mm256_add_ps(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
  const __m256d b0 = _mm256_castps_pd(b[0]);
  const __m256d b1 = _mm256_castps_pd(b[1]);
  store(out, _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(b0, b1)),
                           _mm256_castpd_ps(_mm256_unpackhi_pd(b0, b1))));
}

#else

// Four lanes as a compiler vector: SSE2, NEON, or whatever the baseline has.
constexpr const char* kPathName = "portable";
typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int64_t kLanes = 4;
constexpr int kAccumulators = 8;
constexpr int kTileTokens = 2;

inline V set1(float x) { return V{x, x, x, x}; }
inline V zero() { return set1(0.0f); }
inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V max(V a, V b) { return a > b ? a : b; }
inline V min(V a, V b) { return a < b ? a : b; }
// To the nearest integer, for |a| < 2^22.
inline V round(V a) {
  const V magic = set1(12582912.0f);
  return (a + magic) - magic;
}
inline V exp2_of_int(V n) {
  const I i = (__builtin_convertvector(n, I) + 127) << 23;
  V v;
  memcpy(&v, &i, sizeof v);
  return v;
}
inline V load_bf16(const char* p) {
  uint16_t bits[4];  // [kLanes]
  memcpy(bits, p, sizeof bits);
  return V{float_of_bf16(bits[0]), float_of_bf16(bits[1]), float_of_bf16(bits[2]), float_of_bf16(bits[3])};
}
inline V load_f16(const char* p) {
  uint16_t bits[4];  // [kLanes]
  memcpy(bits, p, sizeof bits);
  const I wide = {bits[0], bits[1], bits[2], bits[3]};
  const I magnitude = (wide & 0x7fff) << 13;
  V v;
  memcpy(&v, &magnitude, sizeof v);
  v *= 0x1p112f;  // denormals included; infinity and NaN have become 2^16 and above
  I result;
  memcpy(&result, &v, sizeof result);
  result |= (((wide & 0x8000) << 16) | (((wide & 0x7fff) >= 0x7c00) & 0x7f800000));
  memcpy(&v, &result, sizeof v);
  return v;
}
inline void store_f16(uint16_t* p, V v) {
  for (int i = 0; i < 4; ++i) p[i] = f16_of_float(v[i]);
}
// Denormals included: the bits read as a float are the value * 2^-120.
inline V load_e4m3(const char* p) {
  uint8_t bytes[4];  // [kLanes]
  memcpy(bytes, p, sizeof bytes);
  const I wide = {bytes[0], bytes[1], bytes[2], bytes[3]};
  const I bits = ((wide & 0x80) << 24) | ((wide & 0x7f) << 20);
  V v;
  memcpy(&v, &bits, sizeof v);
  return v * 0x1p112f;
}
constexpr float kE4m3Factor = 256.0f;

inline float hsum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float hmax(V v) {
  float best = v[0];
  for (int i = 1; i < 4; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
// out[i] = hsum(v[i]) for i in 0 .. kAccumulators - 1.
inline void reduce(const V* v, float* out) {
  for (int i = 0; i < kAccumulators; ++i) out[i] = hsum(v[i]);
}

#endif

// How a weight's elements are read: kLanes at a time, or the n < kLanes that are left of a row (zeros after).
// kFactor: what a loaded value must still be multiplied by.
struct ReadF32 {
  static constexpr int64_t kBytes = 4;
  static constexpr float kFactor = 1.0f;
  static inline V read(const char* p) { return load(reinterpret_cast<const float*>(p)); }
};
struct ReadBf16 {
  static constexpr int64_t kBytes = 2;
  static constexpr float kFactor = 1.0f;
  static inline V read(const char* p) { return load_bf16(p); }
};
struct ReadF16 {
  static constexpr int64_t kBytes = 2;
  static constexpr float kFactor = 1.0f;
  static inline V read(const char* p) { return load_f16(p); }
};
struct ReadE4m3 {
  static constexpr int64_t kBytes = 1;
  static constexpr float kFactor = kE4m3Factor;
  static inline V read(const char* p) { return load_e4m3(p); }
};

// How the latent cache is stored.
#if defined(RODIN_BF16_CACHE)
using ReadCache = ReadBf16;
constexpr Dtype kCacheDtype = Dtype::kBF16;
inline void store_cache(uint16_t* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}
#else
using ReadCache = ReadF16;
constexpr Dtype kCacheDtype = Dtype::kF16;
inline void store_cache(uint16_t* p, V v) { store_f16(p, v); }
#endif

template <class Read>
inline V read_tail(const char* p, int64_t n) {
  alignas(64) char buffer[64];
  copy_tail(p, n * Read::kBytes, buffer);
  return Read::read(buffer);
}
inline V load_tail(const float* p, int64_t n) {
  return read_tail<ReadF32>(reinterpret_cast<const char*>(p), n);
}
inline void store_tail(float* p, V v, int64_t n) {
  alignas(64) float buffer[16];  // [16]
  store(buffer, v);
  memcpy(p, buffer, static_cast<size_t>(n) * sizeof(float));
}

// exp(x) for any x, to about 2 ulp; below -87 it stops at 1.6e-38 and above 88 at 1.7e38. A NaN stays.
inline V exp(V x) {
  x = max(set1(-87.0f), min(set1(88.0f), x));
  const V n = round(mul(x, set1(1.44269504f)));
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return mul(p, exp2_of_int(n));
}
inline float exp_scalar(float x) {
  float lanes[16];  // [16]
  store(lanes, exp(set1(x)));
  return lanes[0];
}

}  // namespace
}  // namespace rodin
