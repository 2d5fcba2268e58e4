// CUDA: a MoE layer of one token in its joined form (moe_joined) against the ops that it stands for, launch
// after launch.
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

struct JoinedMoeCase {
  std::string name;
  int64_t hidden, intermediate, shared;  // shared: 0 where there is none
  int64_t experts, chosen;
  int64_t groups = 1, kept = 1;
  ScoringFunc scoring = ScoringFunc::kSigmoid;
  TopkMethod method = TopkMethod::kNoauxTc;
};

// A layer on the GPU.
class JoinedMoeRig {
 public:
  JoinedMoeRig(const JoinedMoeCase& c, bool is_deterministic, Dtype dtype = Dtype::kF8E4M3)
      : gpu(make_gpu("auto", is_deterministic)) {
    const auto add = [&](int64_t rows, int64_t cols, Dtype of) {
      weights_.push_back(random_weight(random, rows, cols, of));
      return weights_.back()->view;
    };
    const auto mlp = [&](int64_t size) {
      return MlpWeights{add(size, c.hidden, dtype), add(size, c.hidden, dtype), add(c.hidden, size, dtype)};
    };
    moe.route.num_experts = c.experts;
    moe.route.experts_per_token = c.chosen;
    moe.route.num_groups = c.groups;
    moe.route.topk_groups = c.kept;
    moe.route.scoring_func = c.scoring;
    moe.route.topk_method = c.method;
    moe.route.norm_topk_prob = true;
    moe.route.routed_scaling_factor = 2.5f;
    moe.router = add(c.experts, c.hidden, Dtype::kBF16);
    bias_ = random_floats(random, c.experts, 0.1f);
    if (c.method == TopkMethod::kNoauxTc) moe.correction_bias = bias_.data();
    for (int64_t e = 0; e < c.experts; ++e) moe.experts.push_back(mlp(c.intermediate));
    if (c.shared > 0) moe.shared = mlp(c.shared);
    gpu->place(moe);
    OpsLimits limits = test_limits(small_mla());
    limits.hidden_size = c.hidden;
    limits.num_experts = c.experts;
    limits.experts_per_token = c.chosen;
    limits.moe_intermediate_size = c.intermediate;
    limits.shared_intermediate_size = c.shared;
    gpu->reserve(limits);
  }

  CudaRandom random{23};
  std::unique_ptr<Ops> gpu;
  MoeWeights moe;

 private:
  std::vector<std::unique_ptr<HostWeight>> weights_;
  Floats bias_;
};

struct JoinedMoeRun {
  DeviceMatrix residual, delta, normed, out, ids, weights;
  JoinedMoeRun(Ops& ops, int64_t tokens, int64_t hidden, int64_t chosen)
      : residual(ops, tokens, hidden, Dtype::kF32),
        delta(ops, tokens, hidden, Dtype::kBF16),
        normed(ops, tokens, hidden, Dtype::kBF16),
        out(ops, tokens, hidden, Dtype::kBF16),
        ids(ops, tokens, chosen, Dtype::kI32),
        weights(ops, tokens, chosen, Dtype::kF32) {}
};

void check_joined_moe(const JoinedMoeCase& c) {
  JoinedMoeRig rig(c, false);
  Ops& gpu = *rig.gpu;
  const Floats before = random_floats(rig.random, c.hidden, 1),
               behind = random_floats(rig.random, c.hidden, 1);
  const DeviceMatrix norm_before(gpu, before, 1, c.hidden, Dtype::kF32);
  const DeviceMatrix norm_behind(gpu, behind, 1, c.hidden, Dtype::kF32);
  const float* const w0 = norm_before.tensor().row<float>(0);
  const float* const w1 = norm_behind.tensor().row<float>(0);
  JoinedMoeRun apart(gpu, 1, c.hidden, c.chosen), joined(gpu, 1, c.hidden, c.chosen);
  int num_same = 0;
  const int num_rounds = 12;
  for (int round = 0; round < num_rounds; ++round) {
    const Floats residual = random_floats(rig.random, c.hidden, 1);
    Floats delta = random_floats(rig.random, c.hidden, round % 3 == 2 ? 300.0f : 0.5f);
    round_to_bf16(delta);
    for (JoinedMoeRun* run : {&apart, &joined}) {
      run->residual.set(residual), run->delta.set(delta);
      run->normed.poison(), run->out.poison(), run->ids.poison(), run->weights.poison();
    }
    gpu.add_rms_norm_route(apart.residual, apart.delta, w0, 1e-6f, apart.normed, rig.moe, apart.ids,
                           apart.weights);
    gpu.moe_add_rms_norm(apart.normed, rig.moe, apart.ids, apart.weights, apart.delta, apart.residual, w1,
                         1e-6f, apart.out);
    CHECK(gpu.moe_joined(joined.residual, joined.delta, w0, 1e-6f, rig.moe, w1, joined.ids, joined.weights,
                         joined.out));
    const std::string where = ", round " + std::to_string(round);
    // Sums in another order may decide between two experts that are nearly as good.
    if (joined.ids.raw() != apart.ids.raw()) continue;
    ++num_same;
    check_near(joined.weights.get(), apart.weights.get(), 1e-5, "expert weights" + where);
    // What the experts added, and all of it.
    Floats got = joined.residual.get(), wanted = apart.residual.get();
    check_near(joined.out.get(), apart.out.get(), kBf16Tolerance, "norm behind" + where);
    for (size_t i = 0; i < got.size(); ++i)
      got[i] -= residual[i] + delta[i], wanted[i] -= residual[i] + delta[i];
    check_near(got, wanted, 1.5 * kBf16Tolerance, "experts" + where);
    // Again: the same bits.
    const std::vector<uint8_t> bits = joined.residual.raw();
    for (int again = 0; again < 8; ++again) {
      joined.residual.set(residual);
      CHECK(gpu.moe_joined(joined.residual, joined.delta, w0, 1e-6f, rig.moe, w1, joined.ids, joined.weights,
                           joined.out));
      check_same_bits(joined.residual.raw(), bits, "again" + where);
    }
  }
  CHECK(num_same >= num_rounds - 2);
}

const bool joined_moe_tests = [] {
  using S = ScoringFunc;
  using M = TopkMethod;
  const std::vector<JoinedMoeCase> cases = {
      {"Moonlight", 2048, 1408, 2816, 64, 6},
      {"no shared expert", 2048, 1408, 0, 8, 2},
      {"inputs in two pieces, 64 experts, groups", 2048, 1536, 1536, 64, 8, 8, 4},
      {"one chosen, no shared expert", 2048, 256, 0, 20, 1},
      {"softmax, odd sizes", 2048, 80, 160, 10, 3, 1, 1, S::kSoftmax, M::kGreedy},
      {"group_limited_greedy, one chosen, wide shared expert", 2048, 64, 4096, 12, 1, 4, 2, S::kSoftmax,
       M::kGroupLimitedGreedy},
  };
  for (const JoinedMoeCase& c : cases) add_cuda_test("joined moe, " + c.name, [c] { check_joined_moe(c); });
  return true;
}();

const bool joined_moe_refusal = add_cuda_test("joined moe leaves the rest to the ops", [] {
  const auto takes = [](const JoinedMoeCase& c, int64_t tokens, bool is_deterministic, Dtype dtype) {
    JoinedMoeRig rig(c, is_deterministic, dtype);
    const DeviceMatrix norm(*rig.gpu, random_floats(rig.random, c.hidden, 1), 1, c.hidden, Dtype::kF32);
    JoinedMoeRun run(*rig.gpu, tokens, c.hidden, c.chosen);
    const float* const w = norm.tensor().row<float>(0);
    return rig.gpu->moe_joined(run.residual, run.delta, w, 1e-6f, rig.moe, w, run.ids, run.weights, run.out);
  };
  const JoinedMoeCase small = {"", 2048, 128, 128, 8, 2};
  CHECK(takes(small, 1, false, Dtype::kF8E4M3));
  CHECK(!takes(small, 1, true, Dtype::kF8E4M3));
  CHECK(!takes(small, 2, false, Dtype::kF8E4M3));
  CHECK(!takes(small, 1, false, Dtype::kBF16));
  CHECK(!takes({"", 1024, 128, 128, 8, 2}, 1, false, Dtype::kF8E4M3));
});

}  // namespace
}  // namespace rodin::test
