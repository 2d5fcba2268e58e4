// Norms, activations and conversions. Included by one translation unit per instruction path.
#pragma once

#include "ops/cpu/kernels_linear.h"

namespace rodin {
namespace {

// Calls fn(at, n): n = kLanes for whole vectors, then once for what is left.
template <class F>
inline void for_vectors(int64_t n, const F& fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) fn(i, kLanes);
  if (i < n) fn(i, n - i);
}
inline V load_part(const float* p, int64_t n) { return n == kLanes ? load(p) : load_tail(p, n); }
inline void store_part(float* p, V v, int64_t n) { n == kLanes ? store(p, v) : store_tail(p, v, n); }

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  V squares = zero();
  for_vectors(n, [&](int64_t i, int64_t count) {
    const V v = load_part(x + i, count);
    squares = fma(v, v, squares);
  });
  const V inverse = set1(1.0f / __builtin_sqrtf(hsum(squares) / static_cast<float>(n) + eps));
  for_vectors(n, [&](int64_t i, int64_t count) {
    const V normed = mul(load_part(x + i, count), inverse);
    store_part(out + i, mul(normed, load_part(weight + i, count)), count);
  });
}

void add_to(float* x, const float* y, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t count) {
    store_part(x + i, add(load_part(x + i, count), load_part(y + i, count)), count);
  });
}

void scale_by(const float* x, float factor, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int64_t count) {
    store_part(out + i, mul(load_part(x + i, count), set1(factor)), count);
  });
}

inline V sigmoid_of(V x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

void silu_mul(const float* gate, const float* up, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int64_t count) {
    const V g = load_part(gate + i, count);
    store_part(out + i, mul(mul(g, sigmoid_of(g)), load_part(up + i, count)), count);
  });
}

void sigmoid(float* x, int64_t n) {
  for_vectors(
      n, [&](int64_t i, int64_t count) { store_part(x + i, sigmoid_of(load_part(x + i, count)), count); });
}

void softmax(float* x, int64_t n) {
  float largest = x[0];
  for (int64_t i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  float sum = 0.0f;
  for_vectors(n, [&](int64_t i, int64_t count) {
    store_part(x + i, exp(sub(load_part(x + i, count), set1(largest))), count);
  });
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

void weighted_sum(const float* const* y, const float* weights, int64_t num, const float* shared, int64_t n,
                  float* out) {
  for_vectors(n, [&](int64_t i, int64_t count) {
    V sum = zero();
    for (int64_t j = 0; j < num; ++j) sum = fma(set1(weights[j]), load_part(y[j] + i, count), sum);
    if (shared) sum = add(sum, load_part(shared + i, count));
    store_part(out + i, sum, count);
  });
}

template <class Read>
inline void widen_row_of(const Weight& weight, int64_t row, float* out) {
  const Rows rows = rows_of<Read>(weight);
  widen_rows<Read>(rows, row, 1, rows.cols, out);
  if (!rows.scale) return;
  for (int64_t k = 0; k < rows.cols; ++k) out[k] *= rows.row_scale(row)[k / rows.block_cols] * Read::kFactor;
}

void widen_row(const Weight& weight, int64_t row, float* out) {
  switch (weight.dtype) {
    case Dtype::kF8E4M3:
      return widen_row_of<ReadE4m3>(weight, row, out);
    case Dtype::kBF16:
      return widen_row_of<ReadBf16>(weight, row, out);
    case Dtype::kF16:
      return widen_row_of<ReadF16>(weight, row, out);
    default:
      return widen_row_of<ReadF32>(weight, row, out);
  }
}

void probe(int64_t n, float* out) {
  V sums[kProbeProducts];
  for (int i = 0; i < kProbeProducts; ++i) sums[i] = set1(static_cast<float>(i));
  const V by = set1(0.5f);
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 16
    for (V& sum : sums) sum = fma(sum, by, by);
  }
  for (int i = 1; i < kProbeProducts; ++i) sums[0] = add(sums[0], sums[i]);
  store(out, sums[0]);
}

float read_all(const float* data, int64_t n) {
  V sums[8];
  for (V& sum : sums) sum = zero();
  for (int64_t i = 0; i < n; i += 8 * kLanes) {
    for (int j = 0; j < 8; ++j) sums[j] = add(sums[j], load(data + i + j * kLanes));
  }
  for (int j = 1; j < 8; ++j) sums[0] = add(sums[0], sums[j]);
  return hsum(sums[0]);
}

void to_cache(const float* x, int64_t n, uint16_t* out) {
  for_vectors(n, [&](int64_t i, int64_t count) {
    if (count == kLanes) return store_cache(out + i, load(x + i));
    uint16_t buffer[16];  // [16]
    store_cache(buffer, load_tail(x + i, count));
    memcpy(out + i, buffer, static_cast<size_t>(count) * sizeof(uint16_t));
  });
}

}  // namespace
}  // namespace rodin
