// What the tests of the CPU ops share: random matrices and weights, and one body run on every path.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "ops/cpu/convert.h"
#include "ops/cpu/cpu_ops.h"
#include "ops/ops.h"
#include "tests/native/test.h"

namespace rodin {

const Kernels& kernels_emulated_amx();  // x86-64 only; emulated_amx_avx512bf16.cc

}  // namespace rodin

namespace rodin::test {

struct OpsRandom {
  uint64_t state = 1;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  // Uniform in (-scale, scale).
  float value(float scale) { return (static_cast<float>(next() >> 8) * 0x1p-23f - 1.0f) * scale; }
};

// A float32 matrix that owns its memory; the padding between rows holds NaN and must stay so.
struct OpsMatrix {
  std::vector<float> data;  // [rows, stride]
  Tensor view;

  OpsMatrix(int64_t rows, int64_t cols, int64_t padding = 3)
      : data(static_cast<size_t>(rows * (cols + padding)), std::nanf("")) {
    view = {data.data(), Dtype::kF32, rows, cols, cols + padding};
  }
  OpsMatrix(const OpsMatrix& other) : data(other.data), view(other.view) { view.data = data.data(); }
  static OpsMatrix random(OpsRandom& random, int64_t rows, int64_t cols, float scale) {
    OpsMatrix matrix(rows, cols);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) matrix.row(i)[j] = random.value(scale);
    }
    return matrix;
  }
  // Of values that bf16 holds, so that rounding them to bf16 changes nothing.
  static OpsMatrix random_bf16(OpsRandom& random, int64_t rows, int64_t cols, float scale) {
    OpsMatrix matrix = OpsMatrix::random(random, rows, cols, scale);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        matrix.row(i)[j] = rodin::float_of_bf16(rodin::bf16_of_float(matrix.row(i)[j]));
      }
    }
    return matrix;
  }
  float* row(int64_t i) const { return view.row<float>(i); }
  bool padding_is_untouched() const {
    for (int64_t i = 0; i < view.rows; ++i) {
      for (int64_t j = view.cols; j < view.stride; ++j) {
        if (!std::isnan(row(i)[j])) return false;
      }
    }
    return true;
  }
};

inline std::vector<float> random_vector(OpsRandom& random, int64_t size, float scale) {
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = random.value(scale);
  return values;
}

// A weight with its memory. The data starts at an odd address, as it may in a shard.
struct OpsWeight {
  std::vector<uint8_t> bytes;
  std::vector<float> scale;
  std::vector<float> bias;
  Weight view;

  OpsWeight() = default;
  OpsWeight(OpsRandom& random, int64_t rows, int64_t cols, Dtype dtype, bool has_bias = false,
            int64_t block_rows = 128, int64_t block_cols = 128) {
    const int64_t size = dtype_bytes(dtype);
    bytes.resize(static_cast<size_t>(rows * cols * size + 1));
    uint8_t* at = bytes.data() + 1;
    const float spread = 1.0f / std::sqrt(static_cast<float>(cols));
    for (int64_t i = 0; i < rows * cols; ++i, at += size) {
      const float value = random.value(spread);
      if (dtype == Dtype::kF32) {
        memcpy(at, &value, 4);
      } else if (dtype == Dtype::kF8E4M3) {
        do {
          *at = static_cast<uint8_t>(random.next() >> 24);
        } while ((*at & 0x7f) == 0x7f);
        // Few denormals and zeros, so that some runs of codes have none.
        if ((*at & 0x78) == 0 && random.below(8) != 0) *at |= 0x40;
      } else {
        const uint16_t bits = dtype == Dtype::kBF16 ? bf16_of_float(value) : rodin::f16_of_float(value);
        memcpy(at, &bits, 2);
      }
    }
    view.data = bytes.data() + 1;
    view.dtype = dtype;
    view.rows = rows;
    view.cols = cols;
    if (dtype == Dtype::kF8E4M3) {
      view.block_rows = block_rows;
      view.block_cols = block_cols;
      const int64_t blocks = ((rows + block_rows - 1) / block_rows) * ((cols + block_cols - 1) / block_cols);
      scale = random_vector(random, blocks, spread / 100);
      view.scale = scale.data();
    }
    if (has_bias) {
      bias = random_vector(random, rows, 1);
      view.bias = bias.data();
    }
  }
};

inline const char* dtype_text(Dtype dtype) {
  return dtype == Dtype::kF32    ? "F32"
         : dtype == Dtype::kF16  ? "F16"
         : dtype == Dtype::kBF16 ? "BF16"
                                 : "F8_E4M3";
}
inline const std::vector<Dtype> kWeightDtypes = {Dtype::kF32, Dtype::kF16, Dtype::kBF16, Dtype::kF8E4M3};

inline std::unique_ptr<Ops> make_reference() { return make_ops({"cpu", "float32", "auto", 1}); }

// A path of its own in the tests: AMX as AVX-512 gives the same bits, on machines that have AVX512-BF16.
inline const std::string kEmulatedAmx = "amxbf16 emulated";

inline std::vector<std::string> tested_cpu_paths() {
  std::vector<std::string> paths = cpu_paths();
  if (std::find(paths.begin(), paths.end(), "avx512bf16") != paths.end()) paths.push_back(kEmulatedAmx);
  return paths;
}

inline std::unique_ptr<Ops> make_cpu_ops(const std::string& path, int num_threads) {
#if defined(__x86_64__)
  if (path == kEmulatedAmx) return std::make_unique<CpuOps>(kernels_emulated_amx(), num_threads);
#endif
  return make_ops({"cpu", "auto", path, num_threads});
}

// Registers `body` for every CPU path with 1 thread and with 3.
template <class F>
bool add_cpu_test(const std::string& name, F body) {
  for (const std::string& path : tested_cpu_paths()) {
    for (int threads : {1, 3}) {
      add_test("cpu " + path + " x" + std::to_string(threads) + ": " + name,
               [=] { body(*make_cpu_ops(path, threads)); });
    }
  }
  return true;
}

// What rounding the inputs of products inside an op may add to a tolerance, on the paths that do so.
inline float rounding_of(const Ops& ops) {
  return ops.name().find("bf16") == std::string::npos ? 0.0f : 1.2e-2f;
}

// |a - b| <= tolerance * (1 + |b|) everywhere.
inline void check_near(const Tensor& a, const Tensor& b, float tolerance) {
  CHECK_EQ(a.rows, b.rows);
  CHECK_EQ(a.cols, b.cols);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.cols; ++j) {
      const float expected = b.row<float>(i)[j];
      CHECK_CLOSE(a.row<float>(i)[j], expected, tolerance * (1 + std::fabs(expected)));
    }
  }
}

inline bool same_bits(const float* a, const float* b, int64_t n) {
  return memcmp(a, b, static_cast<size_t>(n) * sizeof(float)) == 0;
}

// Limits large enough for every test of this folder.
inline OpsLimits test_limits() {
  OpsLimits limits;
  limits.max_step_tokens = 400;
  limits.max_num_seqs = 64;
  limits.max_logit_rows = 64;
  limits.num_blocks = 128;
  limits.block_size = 16;
  limits.hidden_size = 512;
  limits.vocab_size = 512;
  limits.max_linear_inputs = 1024;
  limits.intermediate_size = 512;
  limits.num_experts = 32;
  limits.experts_per_token = 6;
  limits.moe_intermediate_size = 128;
  limits.shared_intermediate_size = 256;
  limits.mla.num_heads = 8;
  limits.mla.nope_dim = 64;
  limits.mla.rope_dim = 64;
  limits.mla.v_dim = 64;
  limits.mla.lora_rank = 512;
  return limits;
}

}  // namespace rodin::test
