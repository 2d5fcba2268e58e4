#include "ops/noise.h"

#include <cmath>
#include <cstdint>

#include "tests/native/test.h"

namespace rodin {
namespace {

void check_philox(PhiloxWords counter, uint32_t key_low, uint32_t key_high, PhiloxWords expected) {
  const PhiloxWords words = philox4x32(counter, key_low, key_high);
  for (int i = 0; i < 4; ++i) CHECK_EQ(words.w[i], expected.w[i]);
}

// The known-answer vectors published with Random123.
TEST("noise: Philox4x32-10 known answers") {
  check_philox({{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check_philox({{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}}, 0xffffffff, 0xffffffff,
               {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check_philox({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0,
               {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

double exact_exponential(uint32_t bits) {
  const double v = (static_cast<double>(bits) + 0.5) * 0x1p-32;
  return bits < 0x80000000u ? -std::log1p(-v) : -std::log((0xffffffffu - bits + 0.5) * 0x1p-32);
}

TEST("noise: Gumbel noise is within 2e-6 of double precision everywhere") {
  const auto check_bits = [](uint32_t bits) {
    const double exact = exact_exponential(bits);
    CHECK_CLOSE(noise::exponential(bits), exact, 4e-7 * exact);
    CHECK_CLOSE(noise::gumbel(bits), -std::log(exact), 2e-6);
  };
  for (const uint32_t bits : {0u, 1u, 2u, 0x4afaf000u, 0x4afb1000u, 0x7ffffffeu, 0x7fffffffu, 0x80000000u,
                              0x80000001u, 0xa1d2a7c0u, 0xfffffffeu, 0xffffffffu}) {
    check_bits(bits);
  }
  for (uint32_t i = 0; i < 200000; ++i) check_bits(i * 2654435761u);
  CHECK(noise::gumbel(0) > 22.8f && noise::gumbel(0) < 23.0f);
  CHECK(noise::gumbel(0xffffffffu) < -3.1f && noise::gumbel(0xffffffffu) > -3.2f);
}

TEST("noise: the same bits on every machine") {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a over the bits of 100,000 values
  for (int32_t id = 0; id < 100000; ++id) {
    const float value = gumbel_noise(0x12345678u, 0x9abcdef0u, 1000 + id / 4096, id);
    hash = (hash ^ static_cast<uint32_t>(noise::float_bits(value))) * 0x100000001b3u;
  }
  CHECK_EQ(hash, uint64_t{0x7e4619b165b74564u});
}

TEST("noise: mean and variance are those of the Gumbel distribution") {
  double sum = 0, sum2 = 0;
  const int n = 400000;
  for (int32_t id = 0; id < n; ++id) {
    const double value = gumbel_noise(7, 9, 3, id);
    sum += value;
    sum2 += value * value;
  }
  const double mean = sum / n;
  CHECK_CLOSE(mean, 0.5772156649, 0.01);
  CHECK_CLOSE(sum2 / n - mean * mean, 1.6449340668, 0.03);
}

TEST("noise: seed, position and token each change it") {
  const float value = gumbel_noise(1, 2, 3, 4);
  CHECK(value != gumbel_noise(0, 2, 3, 4));
  CHECK(value != gumbel_noise(1, 0, 3, 4));
  CHECK(value != gumbel_noise(1, 2, 4, 4));
  CHECK(value != gumbel_noise(1, 2, 3, 5));
  CHECK_EQ(value, gumbel_noise(1, 2, 3, 4));
}

}  // namespace
}  // namespace rodin
