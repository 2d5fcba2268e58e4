// Exact widening of the storage types, in scalar code and in every path's vector code.
#include "ops/cpu/cpu_path.h"
#include "ops/cpu/kernels.h"
#include "tests/native/ops_support.h"

namespace rodin::test {
namespace {

// The value of an e4m3 code by its definition.
double e4m3_by_definition(int code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa / 8.0, -6) : std::ldexp(1 + mantissa / 8.0, exponent - 7);
  return code & 0x80 ? -magnitude : magnitude;
}

bool is_e4m3_nan(int code) { return (code & 0x7f) == 0x7f; }

double f16_by_definition(int code) {
  const int exponent = (code >> 10) & 31;
  const int mantissa = code & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa / 1024.0, -14) : std::ldexp(1 + mantissa / 1024.0, exponent - 15);
  return code & 0x8000 ? -magnitude : magnitude;
}

TEST("e4m3: all 256 codes widen exactly") {
  for (int code = 0; code < 256; ++code) {
    const float value = float_of_e4m3(static_cast<uint8_t>(code));
    if (is_e4m3_nan(code)) {
      CHECK(std::isnan(value));
    } else {
      CHECK_EQ(static_cast<double>(value), e4m3_by_definition(code));
    }
  }
}

TEST("f16: all codes widen exactly and round back to themselves") {
  for (int code = 0; code < 65536; ++code) {
    const auto bits = static_cast<uint16_t>(code);
    const float value = float_of_f16(bits);
    if ((code & 0x7fff) > 0x7c00) {
      CHECK(std::isnan(value));
      CHECK(std::isnan(float_of_f16(rodin::f16_of_float(value))));
      continue;
    }
    if ((code & 0x7fff) < 0x7c00) CHECK_EQ(static_cast<double>(value), f16_by_definition(code));
    CHECK_EQ(int{rodin::f16_of_float(value)}, code);
  }
}

TEST("f16 and bf16: rounding goes to the nearest, ties to even, beyond the range to infinity") {
  CHECK_EQ(int{rodin::f16_of_float(1.0f + 0x1p-11f)}, 0x3c00);
  CHECK_EQ(int{rodin::f16_of_float(1.0f + 3 * 0x1p-11f)}, 0x3c02);
  CHECK_EQ(int{rodin::f16_of_float(1.0f + 0x1.004p-11f)}, 0x3c01);
  CHECK_EQ(int{rodin::f16_of_float(65504.0f)}, 0x7bff);
  CHECK_EQ(int{rodin::f16_of_float(65519.99f)}, 0x7bff);
  CHECK_EQ(int{rodin::f16_of_float(-65520.0f)}, 0xfc00);
  CHECK_EQ(int{rodin::f16_of_float(0x1p-25f)}, 0);
  CHECK_EQ(int{rodin::f16_of_float(0x1.8p-25f)}, 1);
  CHECK_EQ(int{bf16_of_float(1.0f + 0x1p-8f)}, 0x3f80);
  CHECK_EQ(int{bf16_of_float(1.0f + 3 * 0x1p-8f)}, 0x3f82);
  CHECK(std::isnan(float_of_bf16(bf16_of_float(std::nanf("")))));
}

const bool kRegistered = [] {
  for (const std::string& path : cpu_paths()) {
    const Kernels& kernels = kernels_of_path(path);
    add_test("cpu " + path + ": widen_row is exact for all e4m3 and f16 codes", [&kernels] {
      std::vector<uint8_t> codes;  // [254]
      for (int code = 0; code < 256; ++code) {
        if (!is_e4m3_nan(code)) codes.push_back(static_cast<uint8_t>(code));
      }
      const float one = 1.0f;
      Weight weight;
      weight.data = codes.data();
      weight.dtype = Dtype::kF8E4M3;
      weight.rows = 1;
      weight.cols = static_cast<int64_t>(codes.size());
      weight.scale = &one;
      weight.block_rows = 1;
      weight.block_cols = 256;
      std::vector<float> out(codes.size());
      kernels.widen_row(weight, 0, out.data());
      for (size_t i = 0; i < codes.size(); ++i)
        CHECK_EQ(static_cast<double>(out[i]), e4m3_by_definition(codes[i]));

      std::vector<uint16_t> halves;  // [65536]
      for (int code = 0; code < 65536; ++code) halves.push_back(static_cast<uint16_t>(code));
      Weight f16;
      f16.data = halves.data();
      f16.dtype = Dtype::kF16;
      f16.rows = 1;
      f16.cols = 65536;
      out.resize(halves.size());
      kernels.widen_row(f16, 0, out.data());
      for (size_t i = 0; i < halves.size(); ++i) {
        const float expected = float_of_f16(halves[i]);
        CHECK(out[i] == expected || (std::isnan(out[i]) && std::isnan(expected)));
      }
    });
    add_test("cpu " + path + ": to_cache rounds like the scalar code", [&kernels] {
      OpsRandom random;
      for (int64_t size : {1, 7, 16, 33, 4096}) {
        std::vector<float> values(static_cast<size_t>(size));
        for (float& value : values) value = float_of_bits(0x33000000u + random.next() % 0x14800000u);
        std::vector<uint16_t> out(values.size() + 1, 0xabcd);
        kernels.to_cache(values.data(), size, out.data());
        for (size_t i = 0; i < values.size(); ++i) {
          const bool is_bf16 = kernels.cache_dtype == Dtype::kBF16;
          const uint16_t expected =
              is_bf16 ? rodin::bf16_of_float(values[i]) : rodin::f16_of_float(values[i]);
          CHECK_EQ(int{out[i]}, int{expected});
        }
        CHECK_EQ(int{out.back()}, 0xabcd);
      }
    });
    add_test("cpu " + path + ": silu, sigmoid and softmax agree with double precision", [&kernels] {
      std::vector<float> x;
      for (float v = -120; v <= 120; v += 0.37f) x.push_back(v);
      const auto size = static_cast<int64_t>(x.size());
      const std::vector<float> up(x.size(), 1.0f);
      std::vector<float> silu_out(x.size());
      kernels.silu_mul(x.data(), up.data(), size, silu_out.data());
      std::vector<float> sigmoid_out = x;
      kernels.sigmoid(sigmoid_out.data(), size);
      std::vector<float> softmax_out = x;
      kernels.softmax(softmax_out.data(), size);
      double total = 0;
      for (float v : x) total += std::exp(double{v} - x.back());
      for (size_t i = 0; i < x.size(); ++i) {
        const double sigmoid = 1 / (1 + std::exp(-double{x[i]}));
        CHECK_CLOSE(sigmoid_out[i], sigmoid, 4e-7 * sigmoid + 1e-37);
        CHECK_CLOSE(silu_out[i], x[i] * sigmoid, 4e-7 * std::fabs(x[i] * sigmoid) + 1e-35);
        const double softmax = std::exp(double{x[i]} - x.back()) / total;
        // The argument x - max is rounded to float32.
        const double relative = 4e-7 + 0x1p-24 * std::fabs(double{x[i]} - x.back());
        CHECK_CLOSE(softmax_out[i], softmax, relative * softmax + 1e-37);
      }
      float nan = std::nanf("");
      kernels.sigmoid(&nan, 1);
      CHECK(std::isnan(nan));
    });
  }
  return true;
}();

}  // namespace
}  // namespace rodin::test
