// CUDA: norms, embedding, row copies, rotary tables and linear layers against the float32 reference.
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

struct LinearCase {
  int64_t rows, cols;
  Dtype dtype;
  int64_t block = 128;
  bool has_bias = false;
};

const char* dtype_name(Dtype dtype) {
  return dtype == Dtype::kF32 ? "f32" : dtype == Dtype::kF16 ? "f16" : dtype == Dtype::kBF16 ? "bf16" : "fp8";
}

std::vector<LinearCase> linear_cases() {
  std::vector<LinearCase> cases;
  for (const Dtype dtype : {Dtype::kF8E4M3, Dtype::kBF16, Dtype::kF16, Dtype::kF32}) {
    for (const auto& [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{
             {331, 200}, {72, 136}, {1, 8}, {5, 13}, {1031, 256}, {128, 640}, {300, 1408}}) {
      cases.push_back({rows, cols, dtype, 128, rows % 2 == 1});
    }
  }
  cases.push_back({3072, 2048, Dtype::kF8E4M3});    // Moonlight q_proj
  cases.push_back({576, 2048, Dtype::kF8E4M3});     // Moonlight kv_a
  cases.push_back({2112, 7168, Dtype::kF8E4M3});    // V3 q_a and kv_a
  cases.push_back({24576, 1536, Dtype::kF8E4M3});   // V3 q_b
  cases.push_back({16384, 2048, Dtype::kBF16});     // a slice of an lm_head
  cases.push_back({331, 200, Dtype::kF8E4M3, 32});  // scale blocks that are widened to bf16
  return cases;
}

// Reference for 17 tokens; every other number of tokens must give the same bits for the same token.
void check_linear(const LinearCase& c) {
  CudaRandom random{static_cast<uint64_t>(c.rows * 31 + c.cols)};
  const std::unique_ptr<Ops> gpu = make_gpu();
  ReferenceOps reference(16);
  const auto host = random_weight(random, c.rows, c.cols, c.dtype, c.block, c.has_bias);
  Weight placed = host->view;
  gpu->place(placed);
  gpu->reserve(test_limits(small_mla()));
  const int64_t most = 161;
  Floats x = random_floats(random, most * c.cols, 1);
  round_to_bf16(x);
  const std::string what = std::to_string(c.rows) + "x" + std::to_string(c.cols);

  const int64_t num_reference = 17;
  Floats wanted(static_cast<size_t>(num_reference * c.rows));
  Floats x_reference(x.begin(), x.begin() + num_reference * c.cols);
  reference.linear(host_tensor(x_reference, num_reference, c.cols), host->view,
                   host_tensor(wanted, num_reference, c.rows));

  for (const int64_t padding : {int64_t{0}, int64_t{3}}) {  // 3: rows that are not 16-byte aligned
    const DeviceMatrix all_x(*gpu, x, most, c.cols, Dtype::kBF16, padding);
    const DeviceMatrix all_out(*gpu, most, c.rows, Dtype::kF32, padding);
    gpu->linear(all_x, placed, all_out);
    const Floats all = all_out.get();
    // FP8 with scale blocks of another size is rounded to bf16 once, when it is placed.
    const bool is_widened = c.dtype == Dtype::kF8E4M3 && c.block % 128 != 0 && c.cols > c.block;
    check_near({all.begin(), all.begin() + num_reference * c.rows}, wanted, is_widened ? 4e-3 : kF32Tolerance,
               what + " f32 out");
    for (const int64_t tokens : {1, 3, 8, 11, 16, 17, 32, 33, 129}) {
      const DeviceMatrix out(*gpu, tokens, c.rows, Dtype::kF32, padding);
      gpu->linear(all_x.tensor().slice_rows(most - tokens, tokens), placed, out);
      const Floats got = out.get();
      CHECK(memcmp(got.data(), all.data() + (most - tokens) * c.rows, got.size() * 4) == 0);
    }
    const DeviceMatrix out16(*gpu, num_reference, c.rows, Dtype::kBF16, padding);
    gpu->linear(all_x.tensor().slice_rows(0, num_reference), placed, out16);
    check_near(out16.get(), wanted, kBf16Tolerance, what + " bf16 out");
  }
}

const bool linear_tests = [] {
  for (const LinearCase& c : linear_cases()) {
    add_cuda_test("linear " + std::to_string(c.rows) + "x" + std::to_string(c.cols) + " " +
                      dtype_name(c.dtype) + (c.block == 128 ? "" : ", odd scale blocks"),
                  [c] { check_linear(c); });
  }
  return true;
}();

void check_pair_and_gated(int64_t rows0, int64_t rows1, int64_t cols, Dtype dtype) {
  CudaRandom random{7};
  const std::unique_ptr<Ops> gpu = make_gpu();
  ReferenceOps reference(16);
  const auto a = random_weight(random, rows0, cols, dtype);
  const auto b = random_weight(random, rows1, cols, dtype, 128, true);
  const auto gate = random_weight(random, rows0, cols, dtype);
  const auto up = random_weight(random, rows0, cols, dtype);
  Weight placed_a = a->view, placed_b = b->view;
  gpu->place(placed_a);
  gpu->place(placed_b);
  MlpWeights mlp{gate->view, up->view, {}};
  MlpWeights placed_mlp = mlp;
  gpu->place(placed_mlp.gate);
  gpu->place(placed_mlp.up);
  gpu->reserve(test_limits(small_mla()));
  for (const int64_t tokens : {1, 3, 12, 29, 70}) {
    Floats x = random_floats(random, tokens * cols, 1);
    round_to_bf16(x);
    Floats wanted0(static_cast<size_t>(tokens * rows0)), wanted1(static_cast<size_t>(tokens * rows1));
    reference.linear_pair(host_tensor(x, tokens, cols), a->view, host_tensor(wanted0, tokens, rows0), b->view,
                          host_tensor(wanted1, tokens, rows1));
    const DeviceMatrix device_x(*gpu, x, tokens, cols, Dtype::kBF16);
    const DeviceMatrix out0(*gpu, tokens, rows0, Dtype::kBF16, 5), out1(*gpu, tokens, rows1, Dtype::kBF16);
    gpu->linear_pair(device_x, placed_a, out0, placed_b, out1);
    check_near(out0.get(), wanted0, kBf16Tolerance, "pair, first");
    check_near(out1.get(), wanted1, kBf16Tolerance, "pair, second");
    reference.gate_up_silu(host_tensor(x, tokens, cols), mlp, host_tensor(wanted0, tokens, rows0));
    const DeviceMatrix gated(*gpu, tokens, rows0, Dtype::kBF16, 3);
    gpu->gate_up_silu(device_x, placed_mlp, gated);
    check_near(gated.get(), wanted0, kBf16Tolerance, "gate_up_silu of " + std::to_string(tokens));
  }
}

const bool pair_tests = [] {
  add_cuda_test("pair and gated fp8", [] { check_pair_and_gated(1536, 576, 2048, Dtype::kF8E4M3); });
  add_cuda_test("pair and gated, odd sizes fp8", [] { check_pair_and_gated(88, 331, 200, Dtype::kF8E4M3); });
  add_cuda_test("pair and gated bf16", [] { check_pair_and_gated(300, 72, 1000, Dtype::kBF16); });
  add_cuda_test("pair and gated f16", [] { check_pair_and_gated(97, 41, 136, Dtype::kF16); });
  add_cuda_test("pair and gated f32", [] { check_pair_and_gated(97, 141, 700, Dtype::kF32); });
  return true;
}();

const bool norm_tests = add_cuda_test("rms_norm, add_rms_norm", [] {
  CudaRandom random{3};
  const std::unique_ptr<Ops> gpu = make_gpu();
  ReferenceOps reference(4);
  const std::vector<int64_t> sizes = {1, 88, 200, 512, 1028, 2048, 7168, 8200};
  std::vector<Floats> weights;
  std::vector<const float*> placed;
  for (const int64_t cols : sizes) weights.push_back(random_floats(random, cols, 1));
  for (const Floats& weight : weights) {
    placed.push_back(gpu->place_vector(weight.data(), static_cast<int64_t>(weight.size())));
  }
  gpu->reserve(test_limits(small_mla()));
  // Rows at odd addresses, and rows that are all aligned.
  for (size_t at = 0; at < 2 * sizes.size(); ++at) {
    const size_t i = at / 2;
    const bool is_aligned = at % 2 == 1;
    const int64_t rows = 5, cols = sizes[i];
    Floats x = random_floats(random, rows * cols, 2), delta = random_floats(random, rows * cols, 1);
    round_to_bf16(delta);
    Floats wanted(x.size());
    const Tensor wanted_tensor = host_tensor(wanted, rows, cols);
    const DeviceMatrix device_x(*gpu, x, rows, cols, Dtype::kF32, is_aligned ? 0 : 1);
    const DeviceMatrix out(*gpu, rows, cols, Dtype::kBF16, is_aligned ? 8 : 7);
    reference.rms_norm(host_tensor(x, rows, cols), weights[i].data(), 1e-6f, wanted_tensor);
    gpu->rms_norm(device_x, placed[i], 1e-6f, out);
    check_near(out.get(), wanted, kBf16Tolerance, "rms_norm");

    reference.add_rms_norm(host_tensor(x, rows, cols), host_tensor(delta, rows, cols), weights[i].data(),
                           1e-6f, wanted_tensor);
    const DeviceMatrix device_delta(*gpu, delta, rows, cols, Dtype::kBF16);
    gpu->add_rms_norm(device_x, device_delta, placed[i], 1e-6f, out);
    check_near(out.get(), wanted, kBf16Tolerance, "add_rms_norm");
    check_near(device_x.get(), x, 1e-7, "residual");

    reference.rms_norm(host_tensor(delta, rows, cols), weights[i].data(), 1e-6f, wanted_tensor);
    gpu->rms_norm(device_delta, placed[i], 1e-6f, device_delta);
    check_near(device_delta.get(), wanted, kBf16Tolerance, "rms_norm in place");
  }
});

const bool embed_tests = add_cuda_test("embed, gather_rows, rope_table", [] {
  CudaRandom random{4};
  const std::unique_ptr<Ops> gpu = make_gpu();
  ReferenceOps reference(4);
  std::vector<std::unique_ptr<HostWeight>> tables;
  std::vector<Weight> placed;
  for (const Dtype dtype : {Dtype::kF8E4M3, Dtype::kBF16, Dtype::kF16, Dtype::kF32}) {
    tables.push_back(random_weight(random, 331, 200, dtype));
    placed.push_back(tables.back()->view);
    gpu->place(placed.back());
  }
  gpu->reserve(test_limits(small_mla()));
  std::vector<int32_t> ids, positions;
  const int64_t tokens = 37;
  for (int64_t i = 0; i < tokens; ++i) {
    ids.push_back(static_cast<int32_t>(random.below(331)));
    positions.push_back(static_cast<int32_t>(i * 4111));
  }
  const std::vector<int32_t> q_start = {0, static_cast<int32_t>(tokens)}, table_start = {0, 1},
                             block_table = {0};
  std::vector<int32_t> cache_positions(static_cast<size_t>(tokens)), zeros(static_cast<size_t>(tokens));
  for (int64_t i = 0; i < tokens; ++i) cache_positions[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  StepIndex host;
  host.num_seqs = 1;
  host.num_tokens = host.max_q_len = host.max_context_len = tokens;
  host.block_size = 64;
  host.token_ids = ids.data();
  host.rope_positions = positions.data();
  host.cache_positions = cache_positions.data();
  host.slots = host.seq_of_token = zeros.data();
  host.q_start = q_start.data();
  host.block_table_start = table_start.data();
  host.block_table = block_table.data();
  const StepIndex index = gpu->begin_step(host, 1);
  for (size_t i = 0; i < tables.size(); ++i) {
    Floats wanted(static_cast<size_t>(tokens * 200));
    reference.embed(tables[i]->view, host, host_tensor(wanted, tokens, 200));
    const DeviceMatrix out(*gpu, tokens, 200, Dtype::kF32, 2);
    gpu->embed(placed[i], index, out);
    check_near(out.get(), wanted, 1e-7, "embed");
  }
  const Floats inv_freq = {1.0f, 0.31f, 0.011f, 0.00071f};
  const DeviceMatrix device_freq(*gpu, inv_freq, 1, 4, Dtype::kF32);
  Floats wanted(static_cast<size_t>(tokens * 8));
  reference.rope_table(host, {inv_freq.data(), 1.25f}, host_tensor(wanted, tokens, 8));
  const DeviceMatrix angles(*gpu, tokens, 8, Dtype::kF32);
  gpu->rope_table(index, {device_freq.tensor().row<float>(0), 1.25f}, angles);
  check_near(angles.get(), wanted, 1e-6, "rope_table");

  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    for (const int64_t cols : {int64_t{64}, int64_t{13}}) {
      Floats from_values = random_floats(random, 50 * cols, 1);
      round_to_bf16(from_values);
      const DeviceMatrix from(*gpu, from_values, 50, cols, dtype);
      for (int round = 0; round < 6; ++round) {  // more than there are staging buffers
        const std::vector<int32_t> rows = {49, round, 7, 7, 0};
        const DeviceMatrix to(*gpu, 5, cols, dtype, 3);
        gpu->gather_rows(from, rows.data(), to);
        Floats picked;
        for (const int32_t row : rows) {
          picked.insert(picked.end(), from_values.begin() + row * cols,
                        from_values.begin() + (row + 1) * cols);
        }
        check_near(to.get(), picked, 0, "gather_rows");
      }
    }
  }
});

}  // namespace
}  // namespace rodin::test
