#include "engine/op_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>

#include "engine/host_index.h"
#include "engine/latent_cache.h"
#include "engine/op_data.h"
#include "engine/step.h"
#include "model/synthetic.h"
#include "model/weights.h"
#include "ops/check.h"
#include "ops/cpu/convert.h"
#include "ops/cpu/reference_ops.h"

namespace rodin {
namespace {

constexpr int64_t kRotatedBytes = int64_t{256} << 20;  // more than a cache holds
constexpr int64_t kMostCopies = 64;
constexpr int64_t kBlock = 64;
constexpr int64_t kOracleTokens = 2;     // rows that are compared: the first and the last
constexpr int64_t kOracleContext = 192;  // keys of the attention that is compared
constexpr int kRuns = 7;

Tensor host_tensor(Floats& values, int64_t rows, int64_t cols) {
  return {values.data(), Dtype::kF32, rows, cols, cols};
}

double relative_error(const Floats& got, const Floats& wanted) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += (double{got[i]} - wanted[i]) * (double{got[i]} - wanted[i]);
    norm += double{wanted[i]} * wanted[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-30));
}

std::vector<int64_t> oracle_rows(int64_t num_tokens) {
  return num_tokens == 1 ? std::vector<int64_t>{0} : std::vector<int64_t>{0, num_tokens - 1};
}

Floats pick_rows(const Floats& values, const std::vector<int64_t>& rows, int64_t cols) {
  Floats picked;
  for (const int64_t row : rows)
    picked.insert(picked.end(), values.begin() + row * cols, values.begin() + (row + 1) * cols);
  return picked;
}

int64_t copies_for(int64_t bytes) {
  return std::clamp<int64_t>((kRotatedBytes + bytes - 1) / bytes, 2, kMostCopies);
}

// Runs of calls, each long enough that waiting for the device at its end does not show; call(i) uses set i.
template <class F>
std::vector<double> time_calls(Ops& ops, double min_seconds, F&& call) {
  void* const word = ops.alloc(64);
  char host[4];
  const char zeros[4] = {};
  ops.upload(word, zeros, sizeof zeros);
  int64_t round = 0;
  const auto run = [&](int64_t count) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < count; ++i) call(round++);
    ops.download(host, word, sizeof host);  // waits for the device
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  run(3);
  const double once = std::max(run(3) / 3, 1e-7);
  const auto count = std::max<int64_t>(1, static_cast<int64_t>(min_seconds / kRuns / once));
  std::vector<double> micros;
  for (int i = 0; i < kRuns; ++i) micros.push_back(run(count) / static_cast<double>(count) * 1e6);
  std::sort(micros.begin(), micros.end());
  ops.free(word);
  return micros;
}

OpsLimits limits_of(const OpCase& c) {
  const bool is_attention = c.op == BenchedOp::kAttention;
  OpsLimits limits;
  limits.max_step_tokens = c.num_tokens;
  limits.max_num_seqs = is_attention ? c.num_tokens : 1;
  limits.max_logit_rows = 1;
  limits.block_size = kBlock;
  limits.num_blocks = is_attention ? c.num_tokens * ((c.context + kBlock - 1) / kBlock) : 1;
  limits.hidden_size = c.spec.hidden_size;
  limits.vocab_size = 1;
  limits.max_linear_inputs =
      std::max({c.cols, c.spec.hidden_size, c.spec.intermediate_size, c.spec.kv_lora_rank,
                c.spec.moe_intermediate_size * std::max<int64_t>(c.spec.num_shared_experts, 1)});
  limits.intermediate_size = c.spec.intermediate_size;
  if (c.op == BenchedOp::kMoe) {
    limits.num_experts = c.spec.num_routed_experts;
    limits.experts_per_token = c.spec.num_experts_per_token;
    limits.moe_intermediate_size = c.spec.moe_intermediate_size;
    limits.shared_intermediate_size = c.spec.moe_intermediate_size * c.spec.num_shared_experts;
  }
  limits.mla = mla_shape(c.spec);
  return limits;
}

OpTiming time_norm(Ops& ops, const OpCase& c) {
  WeightFactory factory;
  const float* const host_weight = factory.ones(c.cols);
  const float* const weight = ops.place_vector(host_weight, c.cols);
  ops.reserve(limits_of(c));
  OpTiming timing;
  timing.copies = copies_for(c.num_tokens * c.cols * 8);
  const Floats start = normals(c.num_tokens * c.cols, 1), added = normals(c.num_tokens * c.cols, 2);
  DeviceTensor out(ops, c.num_tokens, c.cols, ops.activation_dtype());
  std::deque<DeviceTensor> residuals, deltas;
  for (int64_t i = 0; i < timing.copies; ++i) {
    residuals.emplace_back(ops, c.num_tokens, c.cols, Dtype::kF32).set(start);
    deltas.emplace_back(ops, c.num_tokens, c.cols, ops.activation_dtype()).set(added);
  }
  ops.add_rms_norm(residuals[0].tensor(), deltas[0].tensor(), weight, 1e-6f, out.tensor());
  const std::vector<int64_t> rows = oracle_rows(c.num_tokens);
  const auto count = static_cast<int64_t>(rows.size());
  ReferenceOps oracle(1);
  Floats residual = pick_rows(start, rows, c.cols), delta = pick_rows(added, rows, c.cols),
         wanted(residual.size());
  oracle.add_rms_norm(host_tensor(residual, count, c.cols), host_tensor(delta, count, c.cols), host_weight,
                      1e-6f, host_tensor(wanted, count, c.cols));
  timing.relative_error = relative_error(out.rows(rows), wanted);
  timing.micros = time_calls(ops, c.min_seconds, [&](int64_t round) {
    const auto i = static_cast<size_t>(round % timing.copies);
    ops.add_rms_norm(residuals[i].tensor(), deltas[i].tensor(), weight, 1e-6f, out.tensor());
  });
  return timing;
}

OpTiming time_linear(Ops& ops, const OpCase& c) {
  WeightFactory factory;
  OpTiming timing;
  timing.copies = copies_for(c.rows * c.cols * dtype_bytes(c.dtype));
  std::vector<Weight> weights;  // [copies]
  for (int64_t i = 0; i < timing.copies; ++i) weights.push_back(factory.make(c.rows, c.cols, c.dtype));
  const Weight host = weights[0];
  for (Weight& weight : weights) ops.place(weight);
  ops.reserve(limits_of(c));
  const Floats inputs = normals(c.num_tokens * c.cols, 3);
  DeviceTensor x(ops, c.num_tokens, c.cols, ops.activation_dtype());
  DeviceTensor out(ops, c.num_tokens, c.rows, ops.activation_dtype());
  x.set(inputs);
  ops.linear(x.tensor(), weights[0], out.tensor());
  const std::vector<int64_t> rows = oracle_rows(c.num_tokens);
  const auto count = static_cast<int64_t>(rows.size());
  ReferenceOps oracle(1);
  Floats picked = pick_rows(inputs, rows, c.cols), wanted(static_cast<size_t>(count * c.rows));
  oracle.linear(host_tensor(picked, count, c.cols), host, host_tensor(wanted, count, c.rows));
  timing.relative_error = relative_error(out.rows(rows), wanted);
  timing.micros = time_calls(ops, c.min_seconds, [&](int64_t round) {
    ops.linear(x.tensor(), weights[static_cast<size_t>(round % timing.copies)], out.tensor());
  });
  return timing;
}

OpTiming time_moe(Ops& ops, const OpCase& c) {
  WeightFactory factory;
  const ModelSpec& spec = c.spec;
  const int64_t hidden = spec.hidden_size;
  OpTiming timing;
  timing.copies = 1;  // the experts of a layer are more than a cache holds; inputs take turns
  // Experts of the same values in memory of their own.
  const auto mlp = [&](int64_t size) {
    return MlpWeights{factory.make(size, hidden, c.dtype), factory.make(size, hidden, c.dtype),
                      factory.make(hidden, size, c.dtype)};
  };
  MoeWeights host;
  host.route = route_params(spec);
  host.router = factory.make(spec.num_routed_experts, hidden, Dtype::kBF16);
  const Floats bias(static_cast<size_t>(host.route.num_experts), 0.0f);
  if (host.route.topk_method == TopkMethod::kNoauxTc) host.correction_bias = bias.data();
  for (int64_t e = 0; e < host.route.num_experts; ++e)
    host.experts.push_back(mlp(spec.moe_intermediate_size));
  if (spec.num_shared_experts > 0) host.shared = mlp(spec.moe_intermediate_size * spec.num_shared_experts);
  MoeWeights placed = host;
  ops.place(placed);
  ops.reserve(limits_of(c));
  const int64_t k = host.route.experts_per_token;
  constexpr int kInputs = 8;
  std::deque<DeviceTensor> xs;  // [kInputs]
  Floats inputs;
  for (int i = 0; i < kInputs; ++i) {
    const Floats values = normals(c.num_tokens * hidden, static_cast<uint64_t>(10 + i));
    if (i == 0) inputs = values;
    xs.emplace_back(ops, c.num_tokens, hidden, ops.activation_dtype()).set(values);
  }
  DeviceTensor ids(ops, c.num_tokens, k, Dtype::kI32), weights(ops, c.num_tokens, k, Dtype::kF32);
  DeviceTensor out(ops, c.num_tokens, hidden, ops.activation_dtype());
  const auto call = [&](int64_t round) {
    const Tensor& x = xs[static_cast<size_t>(round % kInputs)].tensor();
    ops.route(x, placed, ids.tensor(), weights.tensor());
    ops.moe(x, placed, ids.tensor(), weights.tensor(), out.tensor());
  };
  call(0);
  // The oracle takes the device's choice: near ties go either way.
  const std::vector<int64_t> rows = oracle_rows(c.num_tokens);
  const auto count = static_cast<int64_t>(rows.size());
  std::vector<int32_t> chosen;  // [count, k]
  std::vector<int32_t> all(static_cast<size_t>(c.num_tokens * ids.tensor().stride));
  ops.download(all.data(), ids.tensor().data, all.size() * sizeof(int32_t));
  for (const int64_t row : rows)
    for (int64_t j = 0; j < k; ++j) chosen.push_back(all[static_cast<size_t>(row * ids.tensor().stride + j)]);
  Floats shares = weights.rows(rows), picked = pick_rows(inputs, rows, hidden);
  Floats wanted(static_cast<size_t>(count * hidden));
  ReferenceOps oracle(1);
  oracle.moe(host_tensor(picked, count, hidden), host, {chosen.data(), Dtype::kI32, count, k, k},
             host_tensor(shares, count, k), host_tensor(wanted, count, hidden));
  timing.relative_error = relative_error(out.rows(rows), wanted);
  timing.micros = time_calls(ops, c.min_seconds, call);
  return timing;
}

// One token of each of `num_seqs` sequences at the last of `context` positions.
struct DecodeIndex {
  HostIndex rows;
  StepBatch step;

  DecodeIndex(int64_t num_seqs, int64_t context) {
    const int64_t blocks_each = (context + kBlock - 1) / kBlock;
    const auto position = static_cast<int32_t>(context - 1);
    rows.clear();
    step.block_table_start.assign(1, 0);
    for (int64_t s = 0; s < num_seqs; ++s) {
      for (int64_t b = 0; b < blocks_each; ++b)
        step.block_table.push_back(static_cast<int32_t>(b * num_seqs + s));
      step.block_table_start.push_back(static_cast<int32_t>(step.block_table.size()));
      rows.add_row(0, position, position, -1);  // its latent is there already
      rows.end_sequence();
    }
  }
  StepIndex view() { return rows.view(step, kBlock, 0); }
};

OpTiming time_attention(Ops& ops, const OpCase& c) {
  WeightFactory factory;
  const MlaShape shape = mla_shape(c.spec);
  const int64_t qk_cols = shape.num_heads * shape.qk_dim(), out_cols = shape.num_heads * shape.v_dim;
  MlaWeights host;
  host.shape = shape;
  host.q_b = factory.make(qk_cols, 16, c.dtype);
  host.kv_a = factory.make(shape.latent_dim(), 16, c.dtype);
  host.kv_a_norm = factory.ones(shape.lora_rank);
  host.kv_b = factory.make(shape.num_heads * (shape.nope_dim + shape.v_dim), shape.lora_rank, c.dtype);
  host.o = factory.make(16, out_cols, c.dtype);
  MlaWeights placed = host;
  ops.place(placed);
  const OpsLimits limits = limits_of(c);
  ops.reserve(limits);
  OpTiming timing;
  timing.copies = copies_for(limits.num_blocks * kBlock * shape.latent_dim() * 2);
  LatentCache cache(ops, timing.copies, limits.num_blocks, kBlock,
                    ops.cache_dtype() == Dtype::kF8E4M3
                        ? shape.lora_rank + shape.lora_rank / 128 * 4 + 2 * shape.rope_dim
                        : shape.latent_dim());
  cache.fill_synthetic();
  const Floats inputs = normals(c.num_tokens * qk_cols, 5);
  DeviceTensor q(ops, c.num_tokens, qk_cols, ops.activation_dtype());
  DeviceTensor out(ops, c.num_tokens, out_cols, ops.activation_dtype());
  q.set(inputs);

  // The oracle attends to the first positions of one sequence, as float32.
  DecodeIndex short_one(1, std::min(kOracleContext, c.context));
  const Tensor& rows = cache.layers()[0].latents;
  const int64_t num_slots = std::min(kOracleContext, c.context), dim = shape.latent_dim();
  const int64_t padded_slots = (num_slots + kBlock - 1) / kBlock * kBlock;
  std::vector<char> bytes(static_cast<size_t>(padded_slots * rows.stride * dtype_bytes(rows.dtype)));
  ops.download(bytes.data(), rows.data, bytes.size());
  Floats latents(static_cast<size_t>(padded_slots * dim));
  for (int64_t slot = 0; slot < padded_slots; ++slot) {
    const char* row = bytes.data() + slot * rows.stride * dtype_bytes(rows.dtype);
    for (int64_t i = 0; i < dim; ++i) {
      float& value = latents[static_cast<size_t>(slot * dim + i)];
      if (rows.dtype != Dtype::kF8E4M3) {
        value = element_as_float(row, rows.dtype, i);
      } else if (i < shape.lora_rank) {
        float scale;
        memcpy(&scale, row + shape.lora_rank + i / 128 * 4, 4);
        value = element_as_float(row, Dtype::kF8E4M3, i) * scale;
      } else {
        const char* rope = row + shape.lora_rank + shape.lora_rank / 128 * 4;
        value = element_as_float(rope, Dtype::kBF16, i - shape.lora_rank);
      }
    }
  }
  ReferenceOps oracle(1);
  Floats query = pick_rows(inputs, {0}, qk_cols), wanted(static_cast<size_t>(out_cols));
  oracle.mla_attention(host_tensor(query, 1, qk_cols), host, short_one.view(),
                       {host_tensor(latents, padded_slots, dim)}, host_tensor(wanted, 1, out_cols));
  ops.mla_attention(q.tensor().slice_rows(0, 1), placed, ops.begin_step(short_one.view(), 0),
                    cache.layers()[0], out.tensor().slice_rows(0, 1));
  timing.relative_error = relative_error(out.rows({0}), wanted);

  DecodeIndex all(c.num_tokens, c.context);
  const StepIndex index = ops.begin_step(all.view(), 0);
  timing.micros = time_calls(ops, c.min_seconds, [&](int64_t round) {
    ops.mla_attention(q.tensor(), placed, index, cache.layers()[static_cast<size_t>(round % timing.copies)],
                      out.tensor());
  });
  return timing;
}

}  // namespace

OpTiming time_op(const BackendOptions& backend, const OpCase& c) {
  check(c.num_tokens > 0, "an op is timed with at least one token, not ", c.num_tokens);
  check(!c.spec.is_gqa(),
        "ops are timed at the shapes of models with multi-head latent attention, not of type ",
        c.spec.model_type);
  const std::unique_ptr<Ops> ops = make_ops(backend);
  switch (c.op) {
    case BenchedOp::kNorm:
      return time_norm(*ops, c);
    case BenchedOp::kLinear:
      return time_linear(*ops, c);
    case BenchedOp::kMoe:
      return time_moe(*ops, c);
    case BenchedOp::kAttention:
      return time_attention(*ops, c);
  }
  fail("an op that is not timed");
}

}  // namespace rodin
