// Routing and experts: every path against the reference, ties, and bitwise batch invariance.
#include "ops/cpu/host_ops.h"
#include "tests/native/ops_support.h"

namespace rodin::test {
namespace {

struct MoeCase {
  std::vector<OpsWeight> owned;
  std::vector<float> bias;
  MoeWeights weights;

  // inner: moe_intermediate_size; shared: that of the shared expert, 0 for none
  MoeCase(OpsRandom& random, Dtype dtype, RouteParams route, int64_t hidden, int64_t inner, int64_t shared) {
    weights.route = route;
    owned.reserve(static_cast<size_t>(3 * route.num_experts + 4));
    const auto make = [&](int64_t rows, int64_t cols, Dtype type) {
      owned.emplace_back(random, rows, cols, type);
      return owned.back().view;
    };
    weights.router = make(route.num_experts, hidden, Dtype::kBF16);
    bias = random_vector(random, route.num_experts, 0.1f);
    weights.correction_bias = bias.data();
    for (int64_t e = 0; e < route.num_experts; ++e) {
      weights.experts.push_back(
          {make(inner, hidden, dtype), make(inner, hidden, dtype), make(hidden, inner, dtype)});
    }
    if (shared > 0) {
      weights.shared = {make(shared, hidden, dtype), make(shared, hidden, dtype),
                        make(hidden, shared, dtype)};
    }
  }
};

struct Routing {
  std::vector<int32_t> ids;
  std::vector<float> weights;
  Tensor ids_view;
  Tensor weights_view;
  Routing(int64_t tokens, int64_t slots)
      : ids(static_cast<size_t>(tokens * slots), -1), weights(static_cast<size_t>(tokens * slots)) {
    ids_view = {ids.data(), Dtype::kI32, tokens, slots, slots};
    weights_view = {weights.data(), Dtype::kF32, tokens, slots, slots};
  }
};

RouteParams route_params(int64_t experts, int64_t slots, int64_t groups, int64_t topk_groups,
                         ScoringFunc scoring, TopkMethod method, bool norm) {
  RouteParams route;
  route.num_experts = experts;
  route.experts_per_token = slots;
  route.num_groups = groups;
  route.topk_groups = topk_groups;
  route.scoring_func = scoring;
  route.topk_method = method;
  route.norm_topk_prob = norm;
  route.routed_scaling_factor = 2.5f;
  return route;
}

const std::vector<std::pair<std::string, RouteParams>> kRoutes = {
    {"sigmoid noaux_tc in 4 groups",
     route_params(16, 4, 4, 2, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, true)},
    {"sigmoid noaux_tc in one group",
     route_params(10, 3, 1, 1, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, false)},
    {"softmax greedy", route_params(13, 6, 1, 1, ScoringFunc::kSoftmax, TopkMethod::kGreedy, false)},
    {"softmax greedy ignores groups",
     route_params(12, 2, 3, 1, ScoringFunc::kSoftmax, TopkMethod::kGreedy, true)},
    {"softmax group_limited_greedy",
     route_params(18, 3, 6, 2, ScoringFunc::kSoftmax, TopkMethod::kGroupLimitedGreedy, true)},
    {"one expert", route_params(4, 1, 1, 1, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, true)},
};

std::vector<int32_t> chosen(const RouteParams& route, const std::vector<float>& scores,
                            const std::vector<float>& bias) {
  MoeWeights moe;
  moe.route = route;
  moe.correction_bias = bias.data();
  std::vector<float> choice(scores.size()), groups(scores.size()), weights(scores.size());
  std::vector<int32_t> ids(static_cast<size_t>(route.experts_per_token));
  choose_experts(scores.data(), moe, choice.data(), groups.data(), ids.data(), weights.data());
  return ids;
}

TEST("choose_experts: by hand") {
  const std::vector<float> none(8, 0.0f);
  const auto v3 = route_params(8, 2, 4, 2, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, true);
  // Groups' sums of two: 0.9 + 0.0, 0.5 + 0.5, 0.6 + 0.1, 0.4 + 0.55: groups 1 and 3 stay.
  const std::vector<float> scores = {0.9f, 0.0f, 0.5f, 0.5f, 0.6f, 0.1f, 0.4f, 0.55f};
  CHECK((chosen(v3, scores, none) == std::vector<int32_t>{7, 2}));
  // The bias moves the choice (group 0 in place of group 3) but not the weights.
  std::vector<float> bias = none;
  bias[1] = 0.7f;
  CHECK((chosen(v3, scores, bias) == std::vector<int32_t>{0, 1}));
  // By the largest alone, groups 0 and 2 stay.
  auto v2 = v3;
  v2.topk_method = TopkMethod::kGroupLimitedGreedy;
  CHECK((chosen(v2, scores, none) == std::vector<int32_t>{0, 4}));
  // Ties: lower groups and lower experts.
  const std::vector<float> equal(8, 0.25f);
  CHECK((chosen(v3, equal, none) == std::vector<int32_t>{0, 1}));
  const auto greedy = route_params(8, 3, 1, 1, ScoringFunc::kSoftmax, TopkMethod::kGreedy, false);
  CHECK((chosen(greedy, {0.1f, 0.3f, 0.2f, 0.3f, 0.3f, 0.0f, 0.0f, 0.0f}, none) ==
         std::vector<int32_t>{1, 3, 4}));
  // Scores that are not finite still give experts that exist.
  const std::vector<float> nan(8, std::nanf(""));
  for (int32_t id : chosen(v3, nan, none)) CHECK(id >= 0 && id < 8);
}

const bool kRegistered = [] {
  for (const auto& [name, route] : kRoutes) {
    add_cpu_test("route " + name, [route = route](Ops& ops) {
      OpsRandom random;
      const MoeCase moe(random, Dtype::kBF16, route, 136, 24, 0);
      const OpsMatrix x = OpsMatrix::random(random, 50, 136, 3);
      ops.reserve(test_limits());
      Routing expected(50, route.experts_per_token), got(50, route.experts_per_token),
          alone(1, route.experts_per_token);
      make_reference()->route(x.view, moe.weights, expected.ids_view, expected.weights_view);
      ops.route(x.view, moe.weights, got.ids_view, got.weights_view);
      CHECK(got.ids == expected.ids);
      check_near(got.weights_view, expected.weights_view, 2e-6f);
      ops.route(x.view.slice_rows(31, 1), moe.weights, alone.ids_view, alone.weights_view);
      CHECK(same_bits(alone.weights.data(), got.weights_view.row<float>(31), route.experts_per_token));
    });
  }
  for (Dtype dtype : kWeightDtypes) {
    for (int64_t shared : {0, 56, 144}) {
      add_cpu_test(
          std::string("moe ") + dtype_text(dtype) + " shared " + std::to_string(shared), [=](Ops& ops) {
            OpsRandom random;
            const int64_t hidden = 200, num_tokens = 40, slots = 4;
            const MoeCase moe(random, dtype, kRoutes[0].second, hidden, 72, shared);
            const OpsMatrix x = OpsMatrix::random_bf16(random, num_tokens, hidden, 3);
            const std::unique_ptr<Ops> reference = make_reference();
            Routing routing(num_tokens, slots);
            reference->route(x.view, moe.weights, routing.ids_view, routing.weights_view);
            OpsMatrix expected(num_tokens, hidden), out(num_tokens, hidden);
            reference->moe(x.view, moe.weights, routing.ids_view, routing.weights_view, expected.view);
            MoeWeights placed = moe.weights;
            ops.place(placed);
            ops.reserve(test_limits());
            ops.moe(x.view, placed, routing.ids_view, routing.weights_view, out.view);
            check_near(out.view, expected.view, 1e-5f + rounding_of(ops));
            CHECK(out.padding_is_untouched());
            for (int64_t count : {1, 3, 7}) {
              for (int64_t first = 0; first + count <= num_tokens; first += count) {
                OpsMatrix part(count, hidden);
                ops.moe(x.view.slice_rows(first, count), placed, routing.ids_view.slice_rows(first, count),
                        routing.weights_view.slice_rows(first, count), part.view);
                for (int64_t t = 0; t < count; ++t) CHECK(same_bits(part.row(t), out.row(first + t), hidden));
              }
            }
          });
    }
  }
  return true;
}();

}  // namespace
}  // namespace rodin::test
