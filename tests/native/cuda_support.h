// What the tests of the CUDA backend share: random matrices and weights, device copies with poisoned outputs,
// and the comparison with the float32 reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "ops/cpu/convert.h"
#include "ops/cpu/reference_ops.h"
#include "tests/native/test.h"

namespace rodin::test {

// Registers a test where this machine has a usable GPU, and nothing elsewhere.
inline bool add_cuda_test(std::string name, std::function<void()> body) {
  static const bool has_gpu = list_devices().usable.front().rfind("cuda:", 0) == 0;
  return has_gpu && add_test("cuda: " + std::move(name), std::move(body));
}

// Small deterministic random numbers.
struct CudaRandom {
  uint64_t state = 1;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  float uniform() { return (static_cast<float>(next() >> 8) + 0.5f) * 0x1p-24f; }
  // Sum of uniforms: near enough to a normal, and fast.
  float normal() {
    float sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
};

using Floats = std::vector<float>;

inline Floats random_floats(CudaRandom& random, int64_t count, float scale) {
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = random.normal() * scale;
  return values;
}

inline void round_to_bf16(Floats& values) {
  for (float& value : values) value = float_of_bf16(bf16_of_float(value));
}

// A weight in host memory with what the view points at.
struct HostWeight {
  std::vector<uint8_t> bytes;  // [rows, cols] of the dtype
  Floats scale;
  Floats bias;
  Weight view;
};

// The bits whose decoded value is nearest to a magnitude; decode rises over 0 .. max_bits.
template <class Decode>
int nearest_bits(float magnitude, int max_bits, Decode decode) {
  int low = 0, high = max_bits;  // the last with decode(low) <= magnitude
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (decode(middle) <= magnitude) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low < max_bits && decode(low + 1) - magnitude < magnitude - decode(low) ? low + 1 : low;
}

inline uint8_t e4m3_of_float(float value) {
  const auto decode = [](int bits) { return float_of_e4m3(static_cast<uint8_t>(bits)); };
  return static_cast<uint8_t>(nearest_bits(std::fabs(value), 0x7e, decode) | (value < 0 ? 0x80 : 0));
}

inline uint16_t f16_of_float(float value) {
  const auto decode = [](int bits) { return float_of_f16(static_cast<uint16_t>(bits)); };
  return static_cast<uint16_t>(nearest_bits(std::fabs(value), 0x7bff, decode) | (value < 0 ? 0x8000 : 0));
}

// Normal weights of about 1 / sqrt(cols), quantised for FP8 with one scale per block x block.
inline std::unique_ptr<HostWeight> random_weight(CudaRandom& random, int64_t rows, int64_t cols, Dtype dtype,
                                                 int64_t block = 128, bool has_bias = false) {
  auto weight = std::make_unique<HostWeight>();
  weight->bytes.resize(static_cast<size_t>(rows * cols * dtype_bytes(dtype)));
  const float spread = 1.0f / std::sqrt(static_cast<float>(cols));
  Weight& view = weight->view;
  view.dtype = dtype;
  view.rows = rows;
  view.cols = cols;
  uint8_t* to = weight->bytes.data();
  if (dtype == Dtype::kF8E4M3) {
    static const std::vector<uint8_t> normals = [] {  // e4m3 of 50 * normal
      CudaRandom own{99};
      std::vector<uint8_t> values(1 << 16);
      for (uint8_t& value : values) value = e4m3_of_float(own.normal() * 50);
      return values;
    }();
    for (int64_t i = 0; i < rows * cols; ++i) to[i] = normals[random.next() >> 16];
    view.block_rows = view.block_cols = block;
    const int64_t scales = ((rows + block - 1) / block) * ((cols + block - 1) / block);
    for (int64_t i = 0; i < scales; ++i) weight->scale.push_back(spread / 50 * (0.5f + random.uniform()));
    view.scale = weight->scale.data();
  } else {
    for (int64_t i = 0; i < rows * cols; ++i) {
      const float value = random.normal() * spread;
      if (dtype == Dtype::kF32) {
        memcpy(to + 4 * i, &value, 4);
      } else {
        const uint16_t bits = dtype == Dtype::kBF16 ? bf16_of_float(value) : f16_of_float(value);
        memcpy(to + 2 * i, &bits, 2);
      }
    }
  }
  if (has_bias) {
    weight->bias = random_floats(random, rows, 1);
    view.bias = weight->bias.data();
  }
  view.data = to;
  return weight;
}

// A float32 matrix on the host as a Tensor.
inline Tensor host_tensor(Floats& values, int64_t rows, int64_t cols) {
  return {values.data(), Dtype::kF32, rows, cols, cols};
}

// A matrix in device memory, its rows `padding` elements further apart than they are long.
class DeviceMatrix {
 public:
  // Contents: bytes 0xff, a NaN in every float dtype.
  DeviceMatrix(Ops& ops, int64_t rows, int64_t cols, Dtype dtype, int64_t padding = 0) : ops_(ops) {
    const int64_t stride = cols + padding;
    bytes_ = static_cast<size_t>(std::max<int64_t>(rows * stride, 1) * dtype_bytes(dtype));
    tensor_ = {ops.alloc(bytes_), dtype, rows, cols, stride};
    poison();
  }
  DeviceMatrix(Ops& ops, const Floats& values, int64_t rows, int64_t cols, Dtype dtype, int64_t padding = 0)
      : DeviceMatrix(ops, rows, cols, dtype, padding) {
    set(values);
  }
  ~DeviceMatrix() { ops_.free(tensor_.data); }
  DeviceMatrix(const DeviceMatrix&) = delete;
  DeviceMatrix& operator=(const DeviceMatrix&) = delete;

  const Tensor& tensor() const { return tensor_; }
  operator const Tensor&() const { return tensor_; }

  void poison() {
    const std::vector<uint8_t> bytes(bytes_, 0xff);
    ops_.upload(tensor_.data, bytes.data(), bytes_);
  }
  void set(const Floats& values) {
    std::vector<uint8_t> bytes(bytes_, 0xff);
    for (int64_t row = 0; row < tensor_.rows; ++row) {
      for (int64_t col = 0; col < tensor_.cols; ++col) {
        const float value = values[static_cast<size_t>(row * tensor_.cols + col)];
        uint8_t* at = bytes.data() + (row * tensor_.stride + col) * dtype_bytes(tensor_.dtype);
        if (tensor_.dtype == Dtype::kF32) {
          memcpy(at, &value, 4);
        } else {
          const uint16_t bits = bf16_of_float(value);
          memcpy(at, &bits, 2);
        }
      }
    }
    ops_.upload(tensor_.data, bytes.data(), bytes_);
  }
  std::vector<uint8_t> raw() const {
    std::vector<uint8_t> bytes(bytes_);
    ops_.download(bytes.data(), tensor_.data, bytes_);
    return bytes;
  }
  // The values; fails where the padding was written to.
  Floats get() const {
    const std::vector<uint8_t> bytes = raw();
    Floats values;
    const int64_t element = dtype_bytes(tensor_.dtype);
    for (int64_t row = 0; row < tensor_.rows; ++row) {
      for (int64_t col = 0; col < tensor_.stride; ++col) {
        const uint8_t* at = bytes.data() + (row * tensor_.stride + col) * element;
        if (col < tensor_.cols) {
          values.push_back(element_as_float(at, tensor_.dtype, 0));
        } else {
          for (int64_t i = 0; i < element; ++i) CHECK_EQ(int{at[i]}, 0xff);
        }
      }
    }
    return values;
  }

 private:
  Ops& ops_;
  Tensor tensor_;
  size_t bytes_ = 0;
};

// |got - wanted| / |wanted| over all values; a NaN (an output that was not written) fails.
inline double relative_error(const Floats& got, const Floats& wanted) {
  CHECK_EQ(got.size(), wanted.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += (double{got[i]} - wanted[i]) * (double{got[i]} - wanted[i]);
    norm += double{wanted[i]} * wanted[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-30));
}

inline void check_near(const Floats& got, const Floats& wanted, double tolerance, const std::string& what) {
  const double error = relative_error(got, wanted);
  if (!(error <= tolerance)) {
    fail(__FILE__, __LINE__,
         what + ": relative error " + std::to_string(error) + ", at most " + std::to_string(tolerance));
  }
}

// Fails unless two downloads are equal bit for bit.
inline void check_same_bits(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b,
                            const std::string& what) {
  if (a.size() != b.size() || memcmp(a.data(), b.data(), a.size()) != 0)
    fail(__FILE__, __LINE__, what + ": bits differ");
}

constexpr double kBf16Tolerance = 4e-3;  // outputs rounded to bf16
constexpr double kF32Tolerance = 2e-5;   // float32 sums

inline std::unique_ptr<Ops> make_gpu(const std::string& kv_cache_dtype = "auto",
                                     bool is_deterministic = true) {
  return make_ops({"cuda:0", "auto", "auto", 1, kv_cache_dtype, is_deterministic});
}

// Limits that fit every test here.
inline OpsLimits test_limits(const MlaShape& mla) {
  OpsLimits limits;
  limits.max_step_tokens = 512;
  limits.max_num_seqs = 64;
  limits.max_logit_rows = 64;
  limits.num_blocks = 600;
  limits.block_size = 16;
  limits.hidden_size = 2048;
  limits.vocab_size = 16384;
  limits.max_linear_inputs = 16384;
  limits.intermediate_size = 8192;
  limits.mla = mla;
  return limits;
}

inline MlaShape small_mla() {
  MlaShape shape;
  shape.num_heads = 4;
  shape.nope_dim = 64;
  shape.rope_dim = 64;
  shape.v_dim = 64;
  shape.lora_rank = 512;
  shape.softmax_scale = 0.09f;
  return shape;
}

}  // namespace rodin::test
