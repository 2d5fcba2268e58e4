// CUDA: decode_enter with the norm ahead of it gives the bits of the norm's launch and decode_enter behind
// it. Not in a build without the kernels.
#include <cuda_runtime_api.h>

#include "cuda/cuda_check.h"
#include "cuda/decode_mla.h"
#include "tests/native/cuda_room.h"
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

using namespace rodin::cuda;

constexpr int32_t kRopeDim = 64, kLoraRank = 512;

struct EnterCase {
  std::string name;
  int32_t hidden, num_heads, nope_dim;
  bool is_fp8 = false;
  float scale = 1;  // of the residual
};

std::vector<uint8_t> poison(size_t count) { return std::vector<uint8_t>(count, 0xff); }

// An FP8 matrix on the device.
struct DeviceWeight {
  std::unique_ptr<HostWeight> host;
  DeviceRoom data, scale;

  DeviceWeight(CudaRandom& random, int32_t rows, int32_t cols)
      : host(random_weight(random, rows, cols, Dtype::kF8E4M3)), data(host->bytes), scale(host->scale) {}
  WeightView view() const {
    const Weight& w = host->view;
    return {.data = data.as<void>(),
            .scale = scale.as<float>(),
            .row_bytes = w.cols,
            .rows = static_cast<int32_t>(w.rows),
            .cols = static_cast<int32_t>(w.cols),
            .block_rows = 128,
            .blocks_per_scale = 1,
            .scale_cols = static_cast<int32_t>((w.cols + 127) / 128),
            .dtype = Dtype::kF8E4M3};
  }
};

void check_enter(const EnterCase& c) {
  CudaRandom random{23};
  const int32_t qk_dim = c.nope_dim + kRopeDim, q_rows = c.num_heads * qk_dim, kv_rows = kLoraRank + kRopeDim;
  const size_t row_bytes = c.is_fp8 ? 512 + 16 + 128 : 2 * kv_rows, num_slots = 3;
  const DeviceWeight q_weight(random, q_rows, c.hidden), kv_weight(random, kv_rows, c.hidden);
  const DeviceWeight w_uk(random, c.num_heads * kLoraRank, c.nope_dim);
  const DeviceRoom norm_weight(random_floats(random, c.hidden, 1));
  const DeviceRoom latent_weight(random_floats(random, kLoraRank, 1));
  const DeviceRoom angles(random_floats(random, kRopeDim, 0.5f));
  const DeviceRoom slots(std::vector<int32_t>{1});
  const DeviceRoom arrivals(std::vector<uint8_t>(16)), exchange(std::vector<uint8_t>(8 * kExchangeWords));
  struct Outputs {
    DeviceRoom normed, q, kv, q_latent, cache;
  };
  const auto make = [&] {
    return std::unique_ptr<Outputs>(
        new Outputs{DeviceRoom(poison(2 * static_cast<size_t>(c.hidden))),
                    DeviceRoom(poison(2 * static_cast<size_t>(q_rows))),
                    DeviceRoom(poison(2 * static_cast<size_t>(kv_rows))),
                    DeviceRoom(poison(2 * static_cast<size_t>(c.num_heads * kLoraRank))),
                    DeviceRoom(poison(num_slots * row_bytes))});
  };
  cudaDeviceProp device;
  RODIN_CUDA(cudaGetDeviceProperties(&device, 0));
  for (int round = 0; round < 3; ++round) {
    const DeviceRoom residual(random_floats(random, c.hidden, c.scale));
    const NormParams norm = {.x = residual.as<float>(),
                             .x_stride = c.hidden,
                             .weight = norm_weight.as<float>(),
                             .eps = 1e-5f,
                             .num_rows = 1,
                             .cols = c.hidden};
    const auto params_of = [&](const Outputs& to) {
      RopeStoreParams rope = {.q = to.q.as<void>(),
                              .q_stride = q_rows,
                              .kv = to.kv.as<void>(),
                              .kv_stride = kv_rows,
                              .norm_weight = latent_weight.as<float>(),
                              .eps = 1e-6f,
                              .rope_table = angles.as<float>(),
                              .rope_stride = kRopeDim,
                              .slots = slots.as<int32_t>(),
                              .cache = to.cache.as<void>(),
                              .cache_stride = static_cast<int64_t>(row_bytes / (c.is_fp8 ? 1 : 2)),
                              .num_tokens = 1,
                              .num_heads = c.num_heads,
                              .nope_dim = c.nope_dim,
                              .rope_dim = kRopeDim,
                              .lora_rank = kLoraRank,
                              .is_cache_fp8 = c.is_fp8};
      return DecodeEnterParams{.rows = {.weight = {q_weight.view(), kv_weight.view()},
                                        .io = {{to.normed.as<void>(), c.hidden, to.q.as<void>(), q_rows},
                                               {to.normed.as<void>(), c.hidden, to.kv.as<void>(), kv_rows}}},
                               .enter = {.rope = rope,
                                         .w_uk = w_uk.view(),
                                         .q_latent = to.q_latent.as<void>(),
                                         .q_latent_stride = kLoraRank,
                                         .is_q_aligned = true},
                               .arrivals = arrivals.as<uint64_t>(),
                               .exchange = exchange.as<uint64_t>(),
                               .num_multiprocessors = device.multiProcessorCount};
    };
    const std::unique_ptr<Outputs> apart = make(), joined = make();
    DecodeEnterParams params = params_of(*apart);
    NormParams own = norm;
    own.out = apart->normed.as<void>();
    own.out_stride = c.hidden;
    CHECK(is_decode_enter(params));
    run_rms_norm(own, nullptr);
    run_decode_enter(params, nullptr);
    params = params_of(*joined);
    params.norm = norm;
    params.rows.io[0].x = params.rows.io[1].x = nullptr;
    CHECK(is_decode_enter(params));
    run_decode_enter(params, nullptr);
    run_decode_enter(params, nullptr);  // writes the same
    RODIN_CUDA(cudaDeviceSynchronize());
    const std::string where = ", round " + std::to_string(round);
    check_same_bits(joined->q.bytes(), apart->q.bytes(), "queries" + where);
    check_same_bits(joined->q_latent.bytes(), apart->q_latent.bytes(), "latent queries" + where);
    check_same_bits(joined->cache.bytes(), apart->cache.bytes(), "cache" + where);
    CHECK(apart->cache.bytes() != poison(num_slots * row_bytes));
    CHECK(joined->normed.bytes() == poison(2 * static_cast<size_t>(c.hidden)));
  }
}

const bool enter_tests = [] {
  const std::vector<EnterCase> cases = {{"Moonlight", 2048, 16, 128},
                                        {"Moonlight, FP8 cache, a large residual", 2048, 16, 128, true, 3e4f},
                                        {"14 heads, rows of 1264", 1264, 14, 128},
                                        {"3 heads, rows of 336, a small residual", 336, 3, 64, false, 1e-6f}};
  for (const EnterCase& c : cases) {
    add_cuda_test("attention's entry with the norm ahead of it, " + c.name, [c] { check_enter(c); });
  }
  return true;
}();

const bool refusal_test = add_cuda_test("attention's entry: no norm ahead of several tokens", [] {
  DecodeEnterParams params;
  params.enter.rope.num_tokens = 2;
  float x = 0;
  params.norm.x = &x;
  CHECK(!is_decode_enter(params));
});

}  // namespace
}  // namespace rodin::test
