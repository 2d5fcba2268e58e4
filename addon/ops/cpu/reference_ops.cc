#include "ops/cpu/reference_ops.h"

#include <cmath>

#include "ops/cpu/convert.h"

namespace rodin {

void dequantise_row(const Weight& weight, int64_t row, float* out) {
  for (int64_t k = 0; k < weight.cols; ++k) {
    out[k] = element_as_float(weight.data, weight.dtype, row * weight.cols + k);
  }
  if (!weight.scale) return;
  const float* scale = weight.scale + row / weight.block_rows * weight.scale_cols();
  for (int64_t k = 0; k < weight.cols; ++k) out[k] *= scale[k / weight.block_cols];
}

float dot_product(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return static_cast<float>(sum);
}

float silu(float x) { return x / (1.0f + std::exp(-x)); }

void ReferenceOps::embed(const Weight& table, const StepIndex& index, const Tensor& out) {
  for (int64_t t = 0; t < out.rows; ++t) dequantise_row(table, index.token_ids[t], out.row<float>(t));
}

void ReferenceOps::rms_norm(const Tensor& x, const float* weight, float eps, const Tensor& out) {
  for (int64_t t = 0; t < x.rows; ++t) {
    const float* from = x.row<float>(t);
    float* to = out.row<float>(t);
    const float mean_square = dot_product(from, from, x.cols) / static_cast<float>(x.cols);
    const float inverse = 1.0f / std::sqrt(mean_square + eps);
    for (int64_t i = 0; i < x.cols; ++i) to[i] = from[i] * inverse * weight[i];
  }
}

void ReferenceOps::add_rms_norm(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                                const Tensor& out) {
  for (int64_t t = 0; t < residual.rows; ++t) {
    float* sum = residual.row<float>(t);
    for (int64_t i = 0; i < residual.cols; ++i) sum[i] += delta.row<float>(t)[i];
  }
  rms_norm(residual, weight, eps, out);
}

void ReferenceOps::linear(const Tensor& x, const Weight& weight, const Tensor& out) {
  pool_.parallel_for(weight.rows, [&](int64_t n, int) {
    std::vector<float> row(static_cast<size_t>(weight.cols));  // [K]
    dequantise_row(weight, n, row.data());
    const float bias = weight.bias ? weight.bias[n] : 0.0f;
    for (int64_t t = 0; t < x.rows; ++t) {
      out.row<float>(t)[n] = dot_product(x.row<float>(t), row.data(), weight.cols) + bias;
    }
  });
}

void ReferenceOps::linear_pair(const Tensor& x, const Weight& weight0, const Tensor& out0,
                               const Weight& weight1, const Tensor& out1) {
  linear(x, weight0, out0);
  linear(x, weight1, out1);
}

void ReferenceOps::gate_up_silu(const Tensor& x, const MlpWeights& mlp, const Tensor& out) {
  std::vector<float> up_data(static_cast<size_t>(out.rows * out.cols));  // [T, I]
  const Tensor up{up_data.data(), Dtype::kF32, out.rows, out.cols, out.cols};
  linear(x, mlp.gate, out);
  linear(x, mlp.up, up);
  for (int64_t t = 0; t < out.rows; ++t) {
    float* row = out.row<float>(t);
    for (int64_t i = 0; i < out.cols; ++i) row[i] = silu(row[i]) * up.row<float>(t)[i];
  }
}

}  // namespace rodin
