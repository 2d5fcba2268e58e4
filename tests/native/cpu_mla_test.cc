// Both forms of attention, over latents and over expanded keys and values, against the reference; decode,
// chunks and batches to the bit; what may not be read is NaN.
#include <algorithm>

#include "ops/cpu/host_ops.h"
#include "tests/native/ops_support.h"

namespace rodin::test {
namespace {

constexpr int64_t kBlockSize = 16;
constexpr int64_t kNumBlocks = 128;

// A cache whose every row is NaN until it is written.
struct TestCache {
  std::vector<uint8_t> bytes;
  CacheLayer layer;
  TestCache(const Ops& ops, int64_t latent_dim)
      : bytes(static_cast<size_t>(kNumBlocks * kBlockSize * latent_dim * dtype_bytes(ops.cache_dtype())),
              0xff) {
    layer.latents = {bytes.data(), ops.cache_dtype(), kNumBlocks * kBlockSize, latent_dim, latent_dim};
  }
};

// Rows of one sequence in a step.
struct Part {
  int64_t seq;
  int64_t first;  // row of the sequence
  int64_t end;
};

struct TestIndex {
  std::vector<int32_t> positions, rope_positions, slots, q_start = {0}, seq_of_token, table_start = {0},
                                                         table;
  StepIndex index;

  // shift 1: the MTP module, whose row of token j is rotated by j - 1
  TestIndex(const std::vector<Part>& parts, int32_t shift, int64_t block_size) {
    for (size_t s = 0; s < parts.size(); ++s) {
      for (int32_t i = 0; i < 20; ++i)
        table.push_back(static_cast<int32_t>((parts[s].seq * 20 + i) * 37 % kNumBlocks));
      for (int64_t p = parts[s].first; p < parts[s].end; ++p) {
        positions.push_back(static_cast<int32_t>(p));
        rope_positions.push_back(static_cast<int32_t>(p) - shift);
        const auto at = static_cast<size_t>(static_cast<int64_t>(s) * 20 + p / block_size);
        slots.push_back(static_cast<int32_t>(table[at] * block_size + p % block_size));
        seq_of_token.push_back(static_cast<int32_t>(s));
        index.max_context_len = std::max(index.max_context_len, p + 1);
      }
      q_start.push_back(static_cast<int32_t>(positions.size()));
      table_start.push_back(static_cast<int32_t>(table.size()));
      index.max_q_len = std::max(index.max_q_len, parts[s].end - parts[s].first);
    }
    index.num_seqs = static_cast<int64_t>(parts.size());
    index.num_tokens = static_cast<int64_t>(positions.size());
    index.block_size = block_size;
    index.first_position = shift;
    index.rope_positions = rope_positions.data();
    index.cache_positions = positions.data();
    index.slots = slots.data();
    index.q_start = q_start.data();
    index.seq_of_token = seq_of_token.data();
    index.block_table_start = table_start.data();
    index.block_table = table.data();
  }
};

struct MlaCase {
  OpsWeight kv_b;
  std::vector<float> norm;      // [lora_rank]
  std::vector<float> inv_freq;  // [rope_dim / 2]
  MlaWeights weights;

  MlaCase(OpsRandom& random, Dtype dtype, int64_t heads, bool interleave, int64_t rank, int64_t rope,
          int64_t nope, int64_t v) {
    MlaShape& shape = weights.shape;
    shape.num_heads = heads;
    shape.nope_dim = nope;
    shape.rope_dim = rope;
    shape.v_dim = v;
    shape.lora_rank = rank;
    shape.softmax_scale = 0.6f;
    shape.rope_interleave = interleave;
    kv_b = OpsWeight(random, heads * (shape.nope_dim + shape.v_dim), rank, dtype);
    norm = random_vector(random, rank, 1.5f);
    for (int64_t i = 0; i < rope / 2; ++i)
      inv_freq.push_back(std::pow(100.0f, -static_cast<float>(i) / 8.0f));
    weights.kv_b = kv_b.view;
    weights.kv_a_norm = norm.data();
  }
};

// Runs store and attention for the rows of `parts`; q and kv hold a row per (seq, position).
OpsMatrix run(Ops& ops, const MlaCase& mla, const std::vector<Part>& parts, const std::vector<OpsMatrix>& q,
              const std::vector<OpsMatrix>& kv, TestCache& cache, int32_t shift, int64_t block_size,
              bool may_write = true) {
  const MlaShape& shape = mla.weights.shape;
  TestIndex at(parts, shift, block_size);
  if (!may_write) std::fill(at.slots.begin(), at.slots.end(), -1);
  const int64_t tokens = at.index.num_tokens;
  OpsMatrix step_q(tokens, shape.num_heads * shape.qk_dim()), step_kv(tokens, shape.latent_dim());
  OpsMatrix angles(tokens, shape.rope_dim), out(tokens, shape.num_heads * shape.v_dim);
  int64_t t = 0;
  for (const Part& part : parts) {
    for (int64_t p = part.first; p < part.end; ++p, ++t) {
      const auto seq = static_cast<size_t>(part.seq);
      std::copy_n(q[seq].row(p), step_q.view.cols, step_q.row(t));
      std::copy_n(kv[seq].row(p), step_kv.view.cols, step_kv.row(t));
    }
  }
  ops.rope_table(at.index, {mla.inv_freq.data(), 1.25f}, angles.view);
  ops.mla_rope_store(step_q.view, step_kv.view, mla.weights, 1e-6f, angles.view, at.index, cache.layer);
  ops.mla_attention(step_q.view, mla.weights, at.index, cache.layer, out.view);
  CHECK(out.padding_is_untouched());
  return out;
}

void check_mla(Ops& ops, Dtype dtype, int64_t heads, bool interleave, int64_t rank, int64_t rope,
               int32_t shift, int64_t nope = 40, int64_t v = 56, int64_t block_size = kBlockSize) {
  OpsRandom random;
  const MlaCase unplaced(random, dtype, heads, interleave, rank, rope, nope, v);
  MlaCase mla = unplaced;
  ops.place(mla.weights);
  const MlaShape& shape = mla.weights.shape;
  const int64_t length = 210;
  std::vector<OpsMatrix> q, kv;
  for (int64_t s = 0; s < 3; ++s) {
    q.push_back(OpsMatrix::random(random, length, heads * shape.qk_dim(), 1));
    kv.push_back(OpsMatrix::random(random, length, shape.latent_dim(), 1));
  }
  OpsLimits limits = test_limits();
  limits.mla = shape;
  limits.block_size = block_size;
  ops.reserve(limits);
  const std::unique_ptr<Ops> reference = make_reference();
  const int64_t first = shift;  // the MTP module has no row for position 0

  // Two prompts and a short one in one step, against the naive form over a float32 cache.
  const std::vector<Part> parts = {{1, first, 5}, {0, first, length}, {2, first, 131}};
  TestCache cache(ops, shape.latent_dim()), exact_cache(*reference, shape.latent_dim());
  const OpsMatrix all = run(ops, mla, parts, q, kv, cache, shift, block_size);
  const OpsMatrix expected = run(*reference, unplaced, parts, q, kv, exact_cache, shift, block_size);
  check_near(all.view, expected.view, 4e-3f + rounding_of(ops));  // the cache is f16

  // Sequence 0 alone, in chunks, and by decoding: the same bits. Its rows lie after those of sequence 1.
  const int64_t cols = all.view.cols;
  const int64_t offset = 5 - first;
  for (int64_t chunk : {length, int64_t{64}, int64_t{17}, int64_t{1}}) {
    TestCache own(ops, shape.latent_dim());
    for (int64_t p = first; p < length; p += chunk) {
      const int64_t end = std::min(length, p + chunk);
      const OpsMatrix part = run(ops, mla, {{0, p, end}}, q, kv, own, shift, block_size);
      for (int64_t t = 0; t < end - p; ++t)
        CHECK(same_bits(part.row(t), all.row(offset + p - first + t), cols));
    }
  }
  // A row whose latent is there already (slot -1) attends to it and writes nothing.
  const std::vector<uint8_t> before = cache.bytes;
  const OpsMatrix again = run(ops, mla, {{0, 77, 79}, {2, 130, 131}}, q, kv, cache, shift, block_size, false);
  CHECK(same_bits(again.row(0), all.row(offset + 77 - first), cols));
  CHECK(same_bits(again.row(2), all.row(offset + length - first + 130 - first), cols));
  CHECK(before == cache.bytes);
}

const bool kRegistered = [] {
  for (Dtype dtype : kWeightDtypes) {
    add_cpu_test(std::string("mla_attention ") + dtype_text(dtype),
                 [=](Ops& ops) { check_mla(ops, dtype, 4, true, 128, 16, 0); });
  }
  for (int64_t heads : {1, 2, 3, 5, 8}) {
    add_cpu_test("mla_attention of " + std::to_string(heads) + " heads",
                 [=](Ops& ops) { check_mla(ops, Dtype::kF8E4M3, heads, true, 144, 24, 0); });
  }
  for (int64_t heads : {16, 20}) {
    add_cpu_test("mla_attention, rows of whole tiles, heads: " + std::to_string(heads),
                 [=](Ops& ops) { check_mla(ops, Dtype::kF8E4M3, heads, true, 256, 32, 0, 32, 24); });
  }
  add_cpu_test("mla_attention, heads of whole blocks",
               [](Ops& ops) { check_mla(ops, Dtype::kF8E4M3, 3, true, 200, 16, 0, 72, 56); });
  add_cpu_test("mla_attention, ranks that no vector divides",
               [](Ops& ops) { check_mla(ops, Dtype::kF8E4M3, 3, true, 131, 6, 0); });
  // What the backend caches expanded, up to the border and one head beyond it.
  for (Dtype dtype : kWeightDtypes) {
    add_cpu_test(std::string("mla_attention, expanded, ") + dtype_text(dtype),
                 [=](Ops& ops) { check_mla(ops, dtype, 4, true, 512, 64, 0, 64, 64); });
  }
  for (int64_t heads : {1, 2, 3, 5, 6}) {
    add_cpu_test(
        "mla_attention around the border of expansion, heads: " + std::to_string(heads),
        [=](Ops& ops) { check_mla(ops, Dtype::kF8E4M3, heads, true, 5 * (44 + 61), 18, 0, 44, 61); });
  }
  add_cpu_test("mla_attention, expanded, rotation by halves",
               [](Ops& ops) { check_mla(ops, Dtype::kBF16, 2, false, 128, 32, 0, 24, 40); });
  add_cpu_test("mla_attention, expanded, of the MTP module: slot 0 is not read",
               [](Ops& ops) { check_mla(ops, Dtype::kF8E4M3, 4, true, 256, 16, 1, 32, 32); });
  add_cpu_test("mla_attention, blocks that do not hold whole groups of keys",
               [](Ops& ops) { check_mla(ops, Dtype::kBF16, 2, true, 128, 16, 0, 24, 40, 12); });
  add_cpu_test("mla_attention, rotation by halves",
               [](Ops& ops) { check_mla(ops, Dtype::kBF16, 4, false, 64, 32, 0); });
  add_cpu_test("mla_attention of the MTP module: slot 0 is not read",
               [](Ops& ops) { check_mla(ops, Dtype::kF8E4M3, 4, true, 128, 16, 1); });
  return true;
}();

TEST("apply_rope: pairs side by side and half a row apart") {
  const std::vector<float> angles = {0.6f, 1.0f, 0.8f, 0.0f};  // cos, cos, sin, sin
  std::vector<float> x = {1, 2, 3, 4};
  apply_rope(x.data(), angles.data(), 4, true);
  CHECK_CLOSE(x[0], 1 * 0.6f - 2 * 0.8f, 1e-6);
  CHECK_CLOSE(x[1], 1 * 0.8f + 2 * 0.6f, 1e-6);
  CHECK_EQ(x[2], 3.0f);
  CHECK_EQ(x[3], 4.0f);
  x = {1, 2, 3, 4};
  apply_rope(x.data(), angles.data(), 4, false);
  CHECK_CLOSE(x[0], 1 * 0.6f - 3 * 0.8f, 1e-6);
  CHECK_CLOSE(x[2], 1 * 0.8f + 3 * 0.6f, 1e-6);
  CHECK_EQ(x[1], 2.0f);
  CHECK_EQ(x[3], 4.0f);
}

}  // namespace
}  // namespace rodin::test
