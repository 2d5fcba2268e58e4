// The noise of replayable sampling: a function of (seed, position of the sampled token, token id) and of
// nothing else. Compiles as plain C++ and as CUDA and gives the same bits in both: integers, and float +, -,
// * that are each rounded on their own (never contracted into a fused multiply-add).
//
//   bits  = word (token_id % 4) of Philox4x32-10(counter = (position, token_id / 4, 0, 0), key = seed)
//   v     = (bits + 1/2) * 2^-32, uniform in (0, 1)
//   noise = -log(-log(1 - v)), a standard Gumbel variate in (-3.2, 23)
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define RODIN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RODIN_HOST_DEVICE inline
#endif

namespace rodin {

struct PhiloxWords {
  uint32_t w[4];  // [4]
};

RODIN_HOST_DEVICE PhiloxWords philox4x32(PhiloxWords counter, uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.w[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.w[2];
    counter = {
        {static_cast<uint32_t>(product1 >> 32) ^ counter.w[1] ^ key_low, static_cast<uint32_t>(product1),
         static_cast<uint32_t>(product0 >> 32) ^ counter.w[3] ^ key_high, static_cast<uint32_t>(product0)}};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

namespace noise {

#if defined(__CUDA_ARCH__)
RODIN_HOST_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
RODIN_HOST_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
#else
// The host is compiled with -ffp-contract=off.
RODIN_HOST_DEVICE float mul(float a, float b) { return a * b; }
RODIN_HOST_DEVICE float add(float a, float b) { return a + b; }
#endif

RODIN_HOST_DEVICE int32_t float_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

RODIN_HOST_DEVICE float float_from_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// log(2^k * (1 + f)) for f in [sqrt(1/2) - 1, sqrt(2) - 1]: f - f^2/2 + f^3 * P(f), P a minimax polynomial.
RODIN_HOST_DEVICE float log_1p_scaled(float f, float k) {
  float p = -0x1.38bfdep-4f;
  p = add(mul(p, f), 0x1.055b96p-3f);
  p = add(mul(p, f), -0x1.0d831ep-3f);
  p = add(mul(p, f), 0x1.22d9e8p-3f);
  p = add(mul(p, f), -0x1.547280p-3f);
  p = add(mul(p, f), 0x1.99a00ep-3f);
  p = add(mul(p, f), -0x1.000226p-2f);
  p = add(mul(p, f), 0x1.555554p-2f);
  const float f2 = mul(f, f);
  const float tail = add(mul(mul(f2, f), p), mul(k, 0x1.7f7d1cp-20f));    // low part of k ln 2
  return add(mul(k, 0x1.62e400p-1f), add(f, add(tail, mul(f2, -0.5f))));  // high part: exact for small k
}

// log(x) for a positive normal x.
RODIN_HOST_DEVICE float log_normal(float x) {
  const int32_t offset = float_bits(x) - 0x3f3504f3;  // from sqrt(1/2)
  const int32_t exponent = offset >> 23;
  const float m = float_from_bits((offset & 0x007fffff) + 0x3f3504f3);  // [sqrt(1/2), sqrt(2))
  return log_1p_scaled(add(m, -1.0f), static_cast<float>(exponent));
}

// -log(1 - v), v = (bits + 1/2) * 2^-32, with full relative precision at both ends: the upper half of the
// range is mirrored, so that whichever of v and 1 - v is small is the one held as a float.
RODIN_HOST_DEVICE float exponential(uint32_t bits) {
  const int32_t mirror = -static_cast<int32_t>(bits >> 31);           // 0 or -1
  const int32_t low = static_cast<int32_t>(bits) ^ mirror;            // [0, 2^31)
  const float w = mul(add(static_cast<float>(low), 0.5f), 0x1p-32f);  // (0, 1/2]: v, or 1 - v where mirrored
  // log(1 - w) = log(1 + f), or log(1/2 * (1 + f)) where 1 - w is below sqrt(1/2)
  const bool is_far = w > 0.29289f;
  const float f = is_far ? add(1.0f, mul(-2.0f, w)) : -w;
  const float log_of_rest = log_1p_scaled(f, is_far ? -1.0f : 0.0f);
  const float log_of_w = log_normal(w);
  return -(mirror != 0 ? log_of_w : log_of_rest);
}

RODIN_HOST_DEVICE float gumbel(uint32_t bits) { return -log_normal(exponential(bits)); }

}  // namespace noise

// exp(x) for x <= 0; 0 below -87. Masses of top_p and sums of log-probabilities are made of it, so that the
// CPU and the GPU keep the same tokens.
RODIN_HOST_DEVICE float exp_non_positive(float x) {
  using noise::add;
  using noise::mul;
  if (!(x > -87.0f)) return 0;
  // x = n ln 2 + r; exp(r) = 1 + r + r^2 P(r), P a minimax polynomial
  const float n = add(add(mul(x, 0x1.715476p+0f), 0x1.8p+23f), -0x1.8p+23f);
  const float r = add(add(x, mul(n, -0x1.62e400p-1f)), mul(n, -0x1.7f7d1cp-20f));
  float p = 0.0013950474f;
  p = add(mul(p, r), 0.008368882f);
  p = add(mul(p, r), 0.041666206f);
  p = add(mul(p, r), 0.1666652f);
  p = add(mul(p, r), 0.5f);
  const float e = add(add(mul(mul(r, r), p), r), 1.0f);
  return mul(e, noise::float_from_bits((static_cast<int32_t>(n) + 127) << 23));
}

RODIN_HOST_DEVICE float gumbel_noise(uint32_t seed_low, uint32_t seed_high, int32_t position,
                                     int32_t token_id) {
  const PhiloxWords counter = {{static_cast<uint32_t>(position), static_cast<uint32_t>(token_id) >> 2, 0, 0}};
  const PhiloxWords words = philox4x32(counter, seed_low, seed_high);
  return noise::gumbel(words.w[token_id & 3]);
}

}  // namespace rodin
