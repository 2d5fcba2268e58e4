// Exact widening of the storage types, and rounding to the 16-bit ones. Internal linkage on purpose: this
// header is compiled with different instruction sets, and the linker must not share one copy among them.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops/tensor.h"

namespace rodin {

static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of_bf16(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

static inline float float_of_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // The magnitude's bits read as a float are the value * 2^-112, denormals included.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even; a NaN stays a NaN.
static inline uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// Round to nearest, ties to even; above the range infinity, and a NaN stays a NaN.
static inline uint16_t f16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 1/2 leaves the value * 2^24, rounded, in the low bits.
    return static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// s eeee mmm, bias 7, no infinity, 0x7f is NaN.
static inline float float_of_e4m3(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80u) << 24;
  const uint32_t magnitude = bits & 0x7fu;
  if (magnitude == 0x7fu) return float_of_bits(sign | 0x7fc00000u);
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 20) * 0x1p120f));
}

// Element i of an array of any float dtype; the array may be unaligned.
static inline float element_as_float(const void* data, Dtype dtype, int64_t i) {
  const char* at = static_cast<const char*>(data) + i * dtype_bytes(dtype);
  if (dtype == Dtype::kF8E4M3) return float_of_e4m3(static_cast<uint8_t>(*at));
  if (dtype == Dtype::kF32) {
    float value;
    memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t bits;
  memcpy(&bits, at, sizeof bits);
  return dtype == Dtype::kBF16 ? float_of_bf16(bits) : float_of_f16(bits);
}

}  // namespace rodin
