// CUDA: the attention half of a layer in three launches (mla_joined) gives the bits of the ops that it stands
// for, launch after launch, recorded or not.
#include "engine/host_index.h"
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

struct JoinedCase {
  std::string name;
  int64_t hidden, num_heads, nope_dim, v_dim;
  std::vector<int64_t> lengths;  // [S] of the contexts, this step's tokens included
  int64_t q_len = 1;
  Dtype cache_dtype = Dtype::kBF16;
  bool is_deterministic = true;
};

constexpr int64_t kBlock = 16, kRopeDim = 64, kLoraRank = 512;

// Weights of a layer, and what a step of it takes.
class JoinedRig {
 public:
  JoinedRig(const JoinedCase& c, Dtype weight_dtype)
      : gpu(make_gpu(c.cache_dtype == Dtype::kF8E4M3 ? "fp8" : "auto", c.is_deterministic)) {
    mla.shape = {c.num_heads, c.nope_dim, kRopeDim, c.v_dim, kLoraRank, 0, true};
    mla.shape.softmax_scale = 1.0f / std::sqrt(static_cast<float>(mla.shape.qk_dim()));
    const auto add = [&](int64_t rows, int64_t cols) {
      weights_.push_back(random_weight(random, rows, cols, weight_dtype));
      return weights_.back()->view;
    };
    mla.q_b = add(c.num_heads * mla.shape.qk_dim(), c.hidden);
    mla.kv_a = add(mla.shape.latent_dim(), c.hidden);
    mla.kv_b = add(c.num_heads * (c.nope_dim + c.v_dim), kLoraRank);
    mla.o = add(c.hidden, c.num_heads * c.v_dim);
    norm_ = random_floats(random, kLoraRank, 1);
    mla.kv_a_norm = norm_.data();
    gpu->place(mla);
    gpu->reserve(test_limits(mla.shape));
    int32_t next_block = 3;
    for (const int64_t length : c.lengths) {
      const size_t first = step_.block_table.size();
      for (int64_t b = 0; b * kBlock < length; ++b) step_.block_table.push_back(next_block++);
      step_.block_table_start.push_back(static_cast<int32_t>(step_.block_table.size()));
      for (int64_t position = length - c.q_len; position < length; ++position) {
        const int32_t slot = static_cast<int32_t>(
            step_.block_table[first + static_cast<size_t>(position / kBlock)] * kBlock + position % kBlock);
        rows_.add_row(0, static_cast<int32_t>(position), static_cast<int32_t>(position), slot);
      }
      rows_.end_sequence();
    }
    num_slots = next_block * kBlock;
  }
  StepIndex begin() { return gpu->begin_step(rows_.view(step_, kBlock, 0), 0); }
  int64_t num_tokens() const { return rows_.num_tokens(); }

  CudaRandom random{17};
  std::unique_ptr<Ops> gpu;
  MlaWeights mla;
  int64_t num_slots = 0;

 private:
  std::vector<std::unique_ptr<HostWeight>> weights_;
  Floats norm_;
  HostIndex rows_ = [] {
    HostIndex rows;
    rows.clear();
    return rows;
  }();
  StepBatch step_ = [] {
    StepBatch step;
    step.block_table_start.assign(1, 0);
    return step;
  }();
};

void check_joined(const JoinedCase& c) {
  JoinedRig rig(c, Dtype::kF8E4M3);
  Ops& gpu = *rig.gpu;
  const int64_t tokens = rig.num_tokens(), heads_qk = c.num_heads * rig.mla.shape.qk_dim();
  const bool is_fp8 = c.cache_dtype == Dtype::kF8E4M3;
  const int64_t cols = is_fp8 ? 512 + 16 + 128 : kLoraRank + kRopeDim;
  Floats latents = random_floats(rig.random, rig.num_slots * (kLoraRank + kRopeDim), 1);
  std::vector<uint8_t> bytes(static_cast<size_t>(rig.num_slots * cols * (is_fp8 ? 1 : 2)));
  for (int64_t slot = 0; slot < rig.num_slots; ++slot) {
    const float* from = latents.data() + slot * (kLoraRank + kRopeDim);
    uint8_t* to = bytes.data() + slot * cols * (is_fp8 ? 1 : 2);
    const auto put = [&](int64_t at, float value) {
      const uint16_t bits = bf16_of_float(value);
      memcpy(to + at, &bits, 2);
    };
    for (int64_t i = 0; i < kLoraRank; ++i)
      is_fp8 ? void(to[i] = e4m3_of_float(from[i])) : put(2 * i, from[i]);
    for (int i = 0; is_fp8 && i < 4; ++i) {
      const float scale = 0.5f + 0.25f * static_cast<float>(i);
      memcpy(to + 512 + 4 * i, &scale, 4);
    }
    for (int64_t i = 0; i < kRopeDim; ++i) put((is_fp8 ? 528 : 2 * kLoraRank) + 2 * i, from[kLoraRank + i]);
  }
  struct Run {
    DeviceMatrix q, kv, attention, out;
    CacheLayer cache;
  };
  const auto make = [&] {
    return std::unique_ptr<Run>(
        new Run{{gpu, tokens, heads_qk, Dtype::kBF16},
                {gpu, tokens, kLoraRank + kRopeDim, Dtype::kBF16},
                {gpu, tokens, c.num_heads * c.v_dim, Dtype::kBF16},
                {gpu, tokens, c.hidden, Dtype::kBF16},
                {{gpu.alloc(bytes.size()), c.cache_dtype, rig.num_slots, cols, cols}}});
  };
  const std::unique_ptr<Run> apart = make(), joined = make();
  DeviceMatrix x(gpu, tokens, c.hidden, Dtype::kBF16);
  Floats angles(static_cast<size_t>(tokens * kRopeDim));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < kRopeDim / 2; ++i) {
      const float angle = rig.random.uniform() * 6;
      angles[static_cast<size_t>(t * kRopeDim + i)] = std::cos(angle);
      angles[static_cast<size_t>(t * kRopeDim + kRopeDim / 2 + i)] = std::sin(angle);
    }
  }
  const DeviceMatrix rope(gpu, angles, tokens, kRopeDim, Dtype::kF32);
  // The first round runs as it is, the second is recorded, the rest are replayed; each with inputs of its
  // own.
  for (int round = 0; round < 5; ++round) {
    x.set(random_floats(rig.random, tokens * c.hidden, 1));
    for (Run* run : {apart.get(), joined.get()}) {
      run->q.poison(), run->kv.poison(), run->attention.poison(), run->out.poison();
      gpu.upload(run->cache.latents.data, bytes.data(), bytes.size());
    }
    const StepIndex index = rig.begin();
    gpu.linear_pair(x, rig.mla.q_b, apart->q, rig.mla.kv_a, apart->kv);
    gpu.mla_store_and_attend(apart->q, apart->kv, rig.mla, 1e-6f, rope, index, apart->cache,
                             apart->attention);
    gpu.linear(apart->attention, rig.mla.o, apart->out);
    gpu.run_recorded(index, [&] {
      // Twice: the second launch follows the first at once, and writes the same.
      for (int i = 0; i < 2; ++i) {
        CHECK(gpu.mla_joined(x, nullptr, rig.mla, 1e-6f, rope, index, joined->cache, joined->q, joined->kv,
                             joined->attention, joined->out));
      }
    });
    const std::string where = ", round " + std::to_string(round);
    check_same_bits(joined->q.raw(), apart->q.raw(), "queries" + where);
    check_same_bits(joined->attention.raw(), apart->attention.raw(), "attention" + where);
    check_same_bits(joined->out.raw(), apart->out.raw(), "out" + where);
    std::vector<uint8_t> caches[2] = {bytes, bytes};
    gpu.download(caches[0].data(), joined->cache.latents.data, bytes.size());
    gpu.download(caches[1].data(), apart->cache.latents.data, bytes.size());
    check_same_bits(caches[0], caches[1], "cache" + where);
    CHECK(caches[0] != bytes);
    for (const float value : joined->out.get()) CHECK(!std::isnan(value));
  }
  gpu.free(apart->cache.latents.data);
  gpu.free(joined->cache.latents.data);
}

const bool joined_tests = [] {
  const std::vector<JoinedCase> cases = {
      {"Moonlight, one token", 2048, 16, 128, 128, {1025}},
      {"Moonlight, one token, spread", 2048, 16, 128, 128, {700}, 1, Dtype::kBF16, false},
      {"Moonlight, one token, FP8 cache", 2048, 16, 128, 128, {2049}, 1, Dtype::kF8E4M3},
      {"Moonlight, one token, many splits", 2048, 16, 128, 128, {9000}, 1, Dtype::kBF16, false},
      {"14 heads, one token, rows of 1264", 1264, 14, 128, 128, {40}},
      {"3 heads, one token, few rows", 336, 3, 64, 64, {130}},
      {"Moonlight, a step that verifies", 2048, 16, 128, 128, {300}, 5, Dtype::kBF16, false},
      {"Moonlight, eight sequences", 2048, 16, 128, 128, {1, 17, 64, 65, 600, 1024, 1025, 2100}},
      {"Moonlight, FP8 cache", 2048, 16, 128, 128, {90, 1300, 2}, 1, Dtype::kF8E4M3},
      {"14 heads, rows of 1264", 1264, 14, 128, 128, {40, 41}},
      {"3 heads, few rows", 336, 3, 64, 64, {33}, 3},
      {"one head, one token", 128, 1, 16, 16, {5}},
      {"one head", 128, 1, 16, 16, {5, 300, 4}},
  };
  for (const JoinedCase& c : cases) add_cuda_test("joined attention, " + c.name, [c] { check_joined(c); });
  return true;
}();

const bool refusal_test = add_cuda_test("joined attention leaves the rest to the ops", [] {
  const auto takes = [](const JoinedCase& c, Dtype weight_dtype) {
    JoinedRig rig(c, weight_dtype);
    Ops& gpu = *rig.gpu;
    const int64_t tokens = rig.num_tokens();
    const DeviceMatrix x(gpu, random_floats(rig.random, tokens * c.hidden, 1), tokens, c.hidden,
                         Dtype::kBF16);
    const DeviceMatrix q(gpu, tokens, c.num_heads * rig.mla.shape.qk_dim(), Dtype::kBF16);
    const DeviceMatrix kv(gpu, tokens, kLoraRank + kRopeDim, Dtype::kBF16);
    const DeviceMatrix attention(gpu, tokens, c.num_heads * c.v_dim, Dtype::kBF16);
    const DeviceMatrix out(gpu, tokens, c.hidden, Dtype::kBF16);
    const DeviceMatrix rope(gpu, random_floats(rig.random, tokens * kRopeDim, 1), tokens, kRopeDim,
                            Dtype::kF32);
    const DeviceMatrix cache(gpu, random_floats(rig.random, rig.num_slots * 576, 1), rig.num_slots, 576,
                             Dtype::kBF16);
    return gpu.mla_joined(x, nullptr, rig.mla, 1e-6f, rope, rig.begin(), {cache.tensor()}, q, kv, attention,
                          out);
  };
  CHECK(takes({"", 512, 4, 64, 64, {40}}, Dtype::kF8E4M3));
  CHECK(!takes({"", 512, 4, 64, 64, {40}}, Dtype::kBF16));
  CHECK(!takes({"", 512, 4, 64, 64, {40, 40, 40, 40, 40, 40, 40, 40, 40}}, Dtype::kF8E4M3));  // nine tokens
  CHECK(!takes({"", 2176, 4, 64, 64, {40}}, Dtype::kF8E4M3));  // 17 blocks of inputs
});

}  // namespace
}  // namespace rodin::test
