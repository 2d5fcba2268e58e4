// CUDA: grouped-query attention against the float32 reference, and the same bits for a row alone.
#include "engine/host_index.h"
#include "engine/step.h"
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

struct Span {
  int64_t begin, end;  // positions computed in this step
};

constexpr int64_t kBlockSize = 16;

// A step over `spans`; sequence s has the blocks s, s + S, s + 2 S, ..
struct GqaStep {
  HostIndex rows;
  StepBatch batch;

  GqaStep(const std::vector<Span>& spans, const std::vector<int32_t>& seqs, int32_t num_seqs) {
    rows.clear();
    batch.block_table_start.assign(1, 0);
    for (size_t i = 0; i < spans.size(); ++i) {
      const auto block_of = [&](int64_t p) {
        return seqs[i] + static_cast<int32_t>(p / kBlockSize) * num_seqs;
      };
      for (int64_t p = 0; p < spans[i].end; p += kBlockSize) batch.block_table.push_back(block_of(p));
      batch.block_table_start.push_back(static_cast<int32_t>(batch.block_table.size()));
      for (int64_t p = spans[i].begin; p < spans[i].end; ++p) {
        const auto position = static_cast<int32_t>(p);
        rows.add_row(0, position, position, static_cast<int32_t>(block_of(p) * kBlockSize + p % kBlockSize));
      }
      rows.end_sequence();
    }
  }
  StepIndex view() const { return rows.view(batch, kBlockSize, 0); }
};

void check_gqa(const GqaShape& shape) {
  CudaRandom random{31};
  const std::unique_ptr<Ops> gpu = make_gpu();
  ReferenceOps reference(4);
  const std::vector<Span> spans = {{0, 40}, {300, 301}, {65, 68}, {0, 1}};
  const auto num_seqs = static_cast<int32_t>(spans.size());
  OpsLimits limits = test_limits({});
  limits.gqa = shape;
  limits.block_size = kBlockSize;
  limits.num_blocks = num_seqs * 19;
  gpu->reserve(limits);
  const GqaStep step(spans, {0, 1, 2, 3}, num_seqs);
  const int64_t tokens = step.rows.num_tokens(), slots = limits.num_blocks * kBlockSize;
  const int64_t q_cols = shape.num_heads * shape.head_dim, kv_cols = shape.row_dim();
  Floats q = random_floats(random, tokens * q_cols, 1), kv = random_floats(random, tokens * kv_cols, 1);
  Floats cache = random_floats(random, slots * kv_cols, 1);
  for (Floats* values : {&q, &kv, &cache}) round_to_bf16(*values);
  Floats angles;
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t j = 0; j < shape.head_dim; ++j) {
      const float angle =
          static_cast<float>(i + 1) * 0.37f / static_cast<float>(j % (shape.head_dim / 2) + 1);
      angles.push_back(j < shape.head_dim / 2 ? std::cos(angle) : std::sin(angle));
    }
  }
  const DeviceMatrix device_q(*gpu, q, tokens, q_cols, Dtype::kBF16);
  const DeviceMatrix device_kv(*gpu, kv, tokens, kv_cols, Dtype::kBF16);
  const DeviceMatrix device_angles(*gpu, angles, tokens, shape.head_dim, Dtype::kF32);
  const DeviceMatrix device_cache(*gpu, cache, slots, kv_cols, Dtype::kBF16);
  const DeviceMatrix out(*gpu, tokens, q_cols, Dtype::kBF16);
  const StepIndex index = gpu->begin_step(step.view(), 0);
  gpu->gqa_rope_store(device_q, device_kv, shape, device_angles, index, {device_cache});
  const StepIndex host = step.view();
  reference.gqa_rope_store(host_tensor(q, tokens, q_cols), host_tensor(kv, tokens, kv_cols), shape,
                           host_tensor(angles, tokens, shape.head_dim), host,
                           {host_tensor(cache, slots, kv_cols)});
  check_near(device_q.get(), q, kBf16Tolerance, "rotated queries");
  check_near(device_cache.get(), cache, kBf16Tolerance, "cache");
  q = device_q.get();
  cache = device_cache.get();
  Floats wanted(static_cast<size_t>(tokens * q_cols));
  reference.gqa_attention(host_tensor(q, tokens, q_cols), shape, host, {host_tensor(cache, slots, kv_cols)},
                          host_tensor(wanted, tokens, q_cols));
  gpu->gqa_attention(device_q, shape, index, {device_cache}, out);
  check_near(out.get(), wanted, kBf16Tolerance, "attention");

  const std::vector<uint8_t> bits = out.raw();
  int64_t row = -1;
  for (int32_t s = 0; s < num_seqs; ++s) {
    row += spans[static_cast<size_t>(s)].end - spans[static_cast<size_t>(s)].begin;
    const int64_t last = spans[static_cast<size_t>(s)].end - 1;
    const GqaStep alone({{last, last + 1}}, {s}, num_seqs);
    const DeviceMatrix own(*gpu, 1, q_cols, Dtype::kBF16);
    gpu->gqa_attention(device_q.tensor().slice_rows(row, 1), shape, gpu->begin_step(alone.view(), 1),
                       {device_cache}, own);
    check_same_bits(own.raw(), {bits.begin() + row * q_cols * 2, bits.begin() + (row + 1) * q_cols * 2},
                    "the last row of sequence " + std::to_string(s));
  }
}

const bool gqa_tests = [] {
  const std::vector<GqaShape> shapes = {
      {32, 8, 128, 0.09f}, {12, 2, 128, 0.09f}, {6, 3, 36, 0.2f}, {2, 2, 256, 0.06f}};
  for (const GqaShape& shape : shapes) {
    add_cuda_test("gqa of " + std::to_string(shape.num_heads) + " heads of " + std::to_string(shape.head_dim),
                  [shape] { check_gqa(shape); });
  }
  return true;
}();

}  // namespace
}  // namespace rodin::test
