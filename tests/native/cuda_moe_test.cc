// CUDA: routing and the mixture of experts against the float32 reference, and the same bits in any batch.
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

struct MoeCase {
  std::string name;
  int64_t hidden, intermediate, shared;  // shared: 0 where there is none
  RouteParams route;
  Dtype dtype;
  Dtype shared_dtype;
};

RouteParams route_of(int64_t experts, int64_t k, int64_t groups, int64_t kept, ScoringFunc scoring,
                     TopkMethod method, bool norm) {
  RouteParams route;
  route.num_experts = experts;
  route.experts_per_token = k;
  route.num_groups = groups;
  route.topk_groups = kept;
  route.scoring_func = scoring;
  route.topk_method = method;
  route.norm_topk_prob = norm;
  route.routed_scaling_factor = 2.5f;
  return route;
}

struct Layer {
  std::vector<std::unique_ptr<HostWeight>> weights;
  Floats bias;
  MoeWeights host;
  MoeWeights placed;
};

Layer make_layer(const MoeCase& c, CudaRandom& random, Ops& gpu) {
  Layer layer;
  const auto add = [&](int64_t rows, int64_t cols, Dtype dtype) {
    layer.weights.push_back(random_weight(random, rows, cols, dtype));
    return layer.weights.back()->view;
  };
  const auto mlp = [&](int64_t size, Dtype dtype) {
    return MlpWeights{add(size, c.hidden, dtype), add(size, c.hidden, dtype), add(c.hidden, size, dtype)};
  };
  MoeWeights& moe = layer.host;
  moe.route = c.route;
  moe.router = add(c.route.num_experts, c.hidden, Dtype::kBF16);
  if (c.route.topk_method == TopkMethod::kNoauxTc) {
    layer.bias = random_floats(random, c.route.num_experts, 0.1f);
    moe.correction_bias = layer.bias.data();
  }
  for (int64_t e = 0; e < c.route.num_experts; ++e) moe.experts.push_back(mlp(c.intermediate, c.dtype));
  if (c.shared > 0) moe.shared = mlp(c.shared, c.shared_dtype);
  layer.placed = moe;
  gpu.place(layer.placed);
  OpsLimits limits = test_limits(small_mla());
  limits.hidden_size = c.hidden;
  limits.num_experts = c.route.num_experts;
  limits.experts_per_token = c.route.experts_per_token;
  limits.moe_intermediate_size = c.intermediate;
  limits.shared_intermediate_size = c.shared;
  gpu.reserve(limits);
  return layer;
}

// The joined forms against the ops that they stand for: the last `tokens` rows of x are what is added first.
void check_joined(Ops& gpu, const MoeCase& c, const MoeWeights& moe, const Tensor& x, CudaRandom& random,
                  int64_t tokens) {
  const int64_t k = c.route.experts_per_token, hidden = c.hidden;
  const Tensor delta = x.slice_rows(x.rows - tokens, tokens);
  const Floats norm_weight = random_floats(random, hidden, 1);
  const DeviceMatrix weight(gpu, norm_weight, 1, hidden, Dtype::kF32);
  const Floats before = random_floats(random, tokens * hidden, 1);
  struct Result {
    DeviceMatrix residual, normed, out, delta, ids, weights;
    Result(Ops& ops, const Floats& start, int64_t rows, int64_t cols, int64_t slots)
        : residual(ops, start, rows, cols, Dtype::kF32),
          normed(ops, rows, cols, Dtype::kBF16),
          out(ops, rows, cols, Dtype::kBF16),
          delta(ops, rows, cols, Dtype::kBF16),
          ids(ops, rows, slots, Dtype::kI32),
          weights(ops, rows, slots, Dtype::kF32) {}
  };
  Result apart(gpu, before, tokens, hidden, k), joined(gpu, before, tokens, hidden, k);
  const float* const w = weight.tensor().row<float>(0);
  const std::string what = " of " + std::to_string(tokens);
  gpu.add_rms_norm(apart.residual, delta, w, 1e-6f, apart.normed);
  gpu.route(apart.normed, moe, apart.ids, apart.weights);
  gpu.add_rms_norm_route(joined.residual, delta, w, 1e-6f, joined.normed, moe, joined.ids, joined.weights);
  check_same_bits(joined.residual.raw(), apart.residual.raw(), "residual ahead of route" + what);
  check_same_bits(joined.normed.raw(), apart.normed.raw(), "norm ahead of route" + what);
  check_same_bits(joined.ids.raw(), apart.ids.raw(), "joined route's ids" + what);
  check_same_bits(joined.weights.raw(), apart.weights.raw(), "joined route's weights" + what);
  gpu.moe(apart.normed, moe, apart.ids, apart.weights, apart.delta);
  gpu.add_rms_norm(apart.residual, apart.delta, w, 1e-6f, apart.out);
  gpu.moe_add_rms_norm(joined.normed, moe, joined.ids, joined.weights, joined.delta, joined.residual, w,
                       1e-6f, joined.out);
  check_same_bits(joined.residual.raw(), apart.residual.raw(), "residual behind moe" + what);
  check_same_bits(joined.out.raw(), apart.out.raw(), "norm behind moe" + what);
}

void check_moe(const MoeCase& c) {
  CudaRandom random{11};
  const std::unique_ptr<Ops> gpu = make_gpu();
  ReferenceOps reference(16);
  const Layer layer = make_layer(c, random, *gpu);
  const int64_t k = c.route.experts_per_token;
  const int64_t most = 150;
  Floats x = random_floats(random, most * c.hidden, 1);
  round_to_bf16(x);

  // Ids may differ from the reference's where two choices are nearly equal; weights hardly.
  std::vector<int32_t> ids(static_cast<size_t>(most * k));
  Floats weights(ids.size());
  const Tensor id_tensor{ids.data(), Dtype::kI32, most, k, k};
  const Tensor weight_tensor = host_tensor(weights, most, k);
  reference.route(host_tensor(x, most, c.hidden), layer.host, id_tensor, weight_tensor);
  const DeviceMatrix device_x(*gpu, x, most, c.hidden, Dtype::kBF16);
  const DeviceMatrix device_ids(*gpu, most, k, Dtype::kI32, 1);
  const DeviceMatrix device_weights(*gpu, most, k, Dtype::kF32, 2);
  gpu->route(device_x, layer.placed, device_ids, device_weights);
  check_near(device_weights.get(), weights, 1e-3, "expert weights");
  const std::vector<uint8_t> raw = device_ids.raw();
  int64_t num_different = 0;
  for (int64_t t = 0; t < most; ++t) {
    for (int64_t j = 0; j < k; ++j) {
      int32_t id;
      memcpy(&id, raw.data() + (t * (k + 1) + j) * 4, 4);
      CHECK(id >= 0 && id < c.route.num_experts);
      num_different += id != ids[static_cast<size_t>(t * k + j)];
      ids[static_cast<size_t>(t * k + j)] = id;
    }
  }
  CHECK(num_different <= most * k / 200);
  const Floats device_values = device_weights.get();
  std::copy(device_values.begin(), device_values.end(), weights.begin());

  Floats wanted(static_cast<size_t>(most * c.hidden));
  reference.moe(host_tensor(x, most, c.hidden), layer.host, id_tensor, weight_tensor,
                host_tensor(wanted, most, c.hidden));
  const DeviceMatrix all(*gpu, most, c.hidden, Dtype::kBF16);
  gpu->moe(device_x, layer.placed, device_ids, device_weights, all);
  check_near(all.get(), wanted, 1.5 * kBf16Tolerance, "moe");
  const std::vector<uint8_t> bits = all.raw();
  for (const int64_t tokens : {1, 2, 3, 17, 40, 129}) {
    const int64_t first = most - tokens;
    const DeviceMatrix out(*gpu, tokens, c.hidden, Dtype::kBF16);
    const Tensor some_ids = device_ids.tensor().slice_rows(first, tokens);
    const Tensor some_weights = device_weights.tensor().slice_rows(first, tokens);
    const std::vector<uint8_t> ids_before = device_ids.raw();
    gpu->route(device_x.tensor().slice_rows(first, tokens), layer.placed, some_ids, some_weights);
    check_same_bits(device_ids.raw(), ids_before, "route of " + std::to_string(tokens));
    gpu->moe(device_x.tensor().slice_rows(first, tokens), layer.placed, some_ids, some_weights, out);
    const auto row_bytes = static_cast<int64_t>(c.hidden * 2);
    check_same_bits(out.raw(), {bits.begin() + first * row_bytes, bits.end()},
                    "moe of " + std::to_string(tokens));
  }
  for (const int64_t tokens : {1, 2, 4, 5, 33}) check_joined(*gpu, c, layer.placed, device_x, random, tokens);
}

const bool moe_tests = [] {
  using S = ScoringFunc;
  using M = TopkMethod;
  const Dtype fp8 = Dtype::kF8E4M3;
  const std::vector<MoeCase> cases = {
      {"Moonlight widths, 16 experts", 2048, 1408, 2816,
       route_of(16, 6, 1, 1, S::kSigmoid, M::kNoauxTc, true), fp8, fp8},
      {"V3 routing", 256, 128, 128, route_of(256, 8, 8, 4, S::kSigmoid, M::kNoauxTc, true), fp8, fp8},
      {"odd sizes, no shared expert", 136, 56, 0, route_of(10, 3, 1, 1, S::kSigmoid, M::kNoauxTc, true),
       Dtype::kBF16, Dtype::kBF16},
      {"odd sizes fp8", 200, 72, 144, route_of(6, 2, 3, 2, S::kSigmoid, M::kNoauxTc, true), fp8, fp8},
      {"group_limited_greedy f16", 104, 40, 40,
       route_of(12, 4, 4, 2, S::kSoftmax, M::kGroupLimitedGreedy, false), Dtype::kF16, Dtype::kF16},
      {"greedy, bf16 shared expert", 128, 128, 256, route_of(8, 3, 1, 1, S::kSoftmax, M::kGreedy, false), fp8,
       Dtype::kBF16},
      {"one expert f32", 100, 33, 17, route_of(4, 1, 1, 1, S::kSoftmax, M::kGreedy, true), Dtype::kF32,
       Dtype::kF32},
  };
  for (const MoeCase& c : cases) add_cuda_test("moe, " + c.name, [c] { check_moe(c); });
  return true;
}();

// Scores that tie exactly: both sides compute the same sums of small fractions.
const bool tie_test = add_cuda_test("route breaks ties towards the lower index", [] {
  CudaRandom random{5};
  const std::unique_ptr<Ops> gpu = make_gpu();
  ReferenceOps reference(4);
  MoeCase c{"",
            64,
            16,
            0,
            route_of(32, 6, 4, 2, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, true),
            Dtype::kBF16,
            Dtype::kBF16};
  Layer layer = make_layer(c, random, *gpu);
  const int64_t tokens = 64;
  Floats x(static_cast<size_t>(tokens * c.hidden));
  for (float& value : x) value = static_cast<float>(random.below(3)) - 1;
  std::vector<uint16_t> router(static_cast<size_t>(c.route.num_experts * c.hidden));
  for (uint16_t& bits : router) bits = bf16_of_float((static_cast<float>(random.below(3)) - 1) / 16);
  memcpy(layer.weights[0]->bytes.data(), router.data(), router.size() * 2);
  Floats bias(static_cast<size_t>(c.route.num_experts), 0.0f);
  layer.host.correction_bias = bias.data();
  gpu->upload(const_cast<void*>(layer.placed.router.data), router.data(), router.size() * 2);
  gpu->upload(const_cast<float*>(layer.placed.correction_bias), bias.data(), bias.size() * 4);

  std::vector<int32_t> ids(static_cast<size_t>(tokens * 6));
  Floats weights(ids.size());
  reference.route(host_tensor(x, tokens, c.hidden), layer.host, {ids.data(), Dtype::kI32, tokens, 6, 6},
                  host_tensor(weights, tokens, 6));
  const DeviceMatrix device_x(*gpu, x, tokens, c.hidden, Dtype::kBF16);
  const DeviceMatrix device_ids(*gpu, tokens, 6, Dtype::kI32), device_weights(*gpu, tokens, 6, Dtype::kF32);
  gpu->route(device_x, layer.placed, device_ids, device_weights);
  const std::vector<uint8_t> raw = device_ids.raw();
  CHECK(memcmp(raw.data(), ids.data(), raw.size()) == 0);
  check_near(device_weights.get(), weights, 1e-6, "expert weights");
});

}  // namespace
}  // namespace rodin::test
