// CUDA: the attention kernel and the sum of its splits by themselves, without W_UK and W_UV: what a kernel
// library's figures are of. Recorded calls, one behind the other, each on a cache of its own. Not in a build
// without the kernels.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "cuda/cuda_check.h"
#include "cuda/mla_plan.h"
#include "cuda/mla_wgmma.h"
#include "cuda/tensor_map.h"
#include "tests/native/cuda_room.h"
#include "tests/native/cuda_speed.h"

namespace rodin::test {
namespace {

using namespace rodin::cuda;

// A plan of decodes, one token each, at these positions.
MlaPlan plan_of(const std::vector<int32_t>& positions, int64_t heads, bool has_spread) {
  const auto batch = static_cast<int64_t>(positions.size());
  std::vector<int32_t> starts;
  for (int32_t s = 0; s <= batch; ++s) starts.push_back(s);
  StepIndex host;
  host.num_seqs = host.num_tokens = batch;
  host.cache_positions = positions.data();
  host.q_start = host.block_table_start = starts.data();
  MlaPlan plan;
  plan.fill(host,
            {.num_heads = heads,
             .max_tokens = 4096,
             .max_partial_rows = 130000,
             .max_tile_rows = kMlaMostTileRows,
             .has_spread = has_spread,
             .num_multiprocessors = 132},
            std::vector<char>(positions.size(), 0));
  return plan;
}

TEST("attention plan: as many splits as fill the device") {
  const auto splits = [](const MlaPlan& plan) { return plan.chunks[0].max_splits; };
  CHECK_EQ(splits(plan_of({4095}, 16, true)), 32);
  CHECK_EQ(splits(plan_of(std::vector<int32_t>(32, 4095), 16, true)), 4);
  CHECK_EQ(splits(plan_of(std::vector<int32_t>(128, 4095), 16, true)), 1);
  CHECK_EQ(splits(plan_of(std::vector<int32_t>(32, 4095), 128, true)), 2);
  // Of one length or not: 128 turns of a device with 132 places, or as long as the longest of them.
  std::vector<int32_t> uneven(128, 500);
  uneven[77] = 8000;
  CHECK(splits(plan_of(uneven, 16, true)) >= 8);
  // A step of 128 heads and 128 sequences is one chunk.
  CHECK_EQ(plan_of(std::vector<int32_t>(128, 4095), 128, true).chunks.size(), size_t{1});
  // By position alone.
  for (const int32_t batch : {1, 128}) {
    CHECK_EQ(splits(plan_of(std::vector<int32_t>(static_cast<size_t>(batch), 4095), 16, false)), 8);
  }
}

struct KernelCase {
  int32_t heads, batch, context, q_len;
  bool is_fp8 = false;
};

// Microseconds of one call of `body` out of `calls`, recorded; the least of several.
template <class F>
double micros_of(cudaStream_t stream, int calls, F&& body) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  RODIN_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < calls; ++i) body(i);
  RODIN_CUDA(cudaStreamEndCapture(stream, &graph));
  RODIN_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t start, end;
  RODIN_CUDA(cudaEventCreate(&start));
  RODIN_CUDA(cudaEventCreate(&end));
  double best = 1e30;
  for (int round = 0; round < 8; ++round) {
    RODIN_CUDA(cudaEventRecord(start, stream));
    RODIN_CUDA(cudaGraphLaunch(exec, stream));
    RODIN_CUDA(cudaEventRecord(end, stream));
    RODIN_CUDA(cudaEventSynchronize(end));
    float ms;
    RODIN_CUDA(cudaEventElapsedTime(&ms, start, end));
    if (round > 1) best = std::min(best, 1e3 * ms / calls);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  return best;
}

void time_kernel(const KernelCase& c) {
  CudaRandom random{5};
  const int64_t block_size = 64, blocks_each = (c.context + block_size - 1) / block_size;
  const int64_t tokens = int64_t{c.batch} * c.q_len, rows = tokens * c.heads;
  const int64_t num_slots = c.batch * blocks_each * block_size, row_bytes = c.is_fp8 ? 656 : 1152;

  const EvenIndex even(c.batch, c.q_len, c.context, block_size);
  int num_multiprocessors;
  RODIN_CUDA(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  MlaPlan plan;
  const int64_t most_rows = (int64_t{256} << 20) / (512 * 4 + 8);
  plan.fill(even.host(),
            {.num_heads = c.heads,
             .max_tokens = tokens,
             .max_partial_rows = most_rows,
             .max_tile_rows = c.is_fp8 ? kMlaMostTileRowsFp8 : kMlaMostTileRows,
             .has_spread = true,
             .num_multiprocessors = num_multiprocessors},
            std::vector<char>(static_cast<size_t>(c.batch), 0));

  std::vector<uint16_t> latents(static_cast<size_t>(num_slots * row_bytes / 2));
  const size_t period = std::min(latents.size(), size_t{1} << 20);
  for (size_t i = 0; i < period; ++i) {
    latents[i] = c.is_fp8
                     ? static_cast<uint16_t>(0x3d3d ^ (random.next() >> 25))
                     : static_cast<uint16_t>(0x3e00 + (random.next() >> 24) + (random.next() >> 31 << 15));
  }
  for (size_t i = period; i < latents.size(); ++i) latents[i] = latents[i - period];
  const auto calls =
      static_cast<int>(std::clamp<int64_t>((int64_t{600} << 20) / (num_slots * row_bytes), 1, 16));
  std::vector<std::unique_ptr<DeviceRoom>> caches;
  for (int i = 0; i < calls; ++i) caches.push_back(std::make_unique<DeviceRoom>(latents));
  std::vector<uint16_t> queries(static_cast<size_t>(rows * 576));
  for (uint16_t& q : queries) q = bf16_of_float(random.normal() * 0.2f);
  const DeviceRoom q_latent(queries), q(rows * 192 * 2), partial(most_rows * 512 * 4),
      partial_ml(most_rows * 8);
  const DeviceRoom out(rows * 512 * 2), tiles(plan.tiles), device_positions(even.positions()),
      device_table(even.table());
  RODIN_CUDA(
      cudaMemcpy(q.as<char>(), queries.data(), static_cast<size_t>(rows) * 192 * 2, cudaMemcpyHostToDevice));

  const auto boxes = [](const void* data, int64_t map_rows, int64_t cols, int64_t stride, int32_t box_rows) {
    return make_tensor_map({.data = data,
                            .rows = map_rows,
                            .cols = cols,
                            .row_bytes = stride * 2,
                            .box_rows = box_rows,
                            .box_cols = kMlaBoxColumns},
                           Dtype::kBF16, Swizzle::k128Bytes);
  };
  std::vector<std::vector<MlaWgmmaParams>> params;  // [calls, chunks]
  for (int i = 0; i < calls; ++i) {
    params.emplace_back();
    for (const MlaChunk& chunk : plan.chunks) {
      MlaWgmmaParams& p = params.back().emplace_back();
      p.mla = {.q_latent = q_latent.as<void>(),
               .q_latent_stride = 512,
               .q = q.as<void>(),
               .q_stride = c.heads * 192,
               .cache = caches[static_cast<size_t>(i)]->as<void>(),
               .cache_stride = c.is_fp8 ? 656 : 576,
               .is_cache_fp8 = c.is_fp8,
               .cache_positions = device_positions.as<int32_t>(),
               .block_table = device_table.as<int32_t>(),
               .tiles = tiles.as<MlaTile>() + chunk.first_tile,
               .num_tiles = chunk.num_tiles,
               .max_splits = chunk.max_splits,
               .first_token = chunk.first_token,
               .num_tokens = chunk.num_tokens,
               .block_size = static_cast<int32_t>(block_size),
               .num_heads = c.heads,
               .nope_dim = 128,
               .rope_dim = 64,
               .lora_rank = 512,
               .tile_rows = plan.tile_rows,
               .spread = plan.spread,
               .softmax_scale = 0.07f,
               .partial = partial.as<float>(),
               .partial_ml = partial_ml.as<float>(),
               .out = out.as<void>(),
               .out_stride = 512};
      p.piece_rows = std::gcd(p.mla.block_size, kMlaKeyBlock);
      p.num_multiprocessors = num_multiprocessors;
      p.q_latent = boxes(p.mla.q_latent, chunk.num_tokens * c.heads, 512, 512, plan.tile_rows);
      p.q_rope = boxes(q.as<uint16_t>() + 128, rows, 64, 192, plan.tile_rows);
      if (!c.is_fp8) p.cache = boxes(p.mla.cache, num_slots, 576, 576, p.piece_rows);
    }
  }
  cudaStream_t stream;
  RODIN_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const double operations = 2.0 * static_cast<double>(rows) * (c.context - c.q_len / 2) * 1088;
  const double bytes = static_cast<double>(num_slots) * static_cast<double>(row_bytes);
  const auto time = [&](bool has_sum) {
    return micros_of(stream, calls, [&](int i) {
      for (const MlaWgmmaParams& p : params[static_cast<size_t>(i)]) {
        run_mla_wgmma(p, stream);
        if (has_sum && p.mla.max_splits > 1) run_mla_combine(p.mla, stream);
      }
    });
  };
  const double kernel = time(false), both = time(true);
  std::printf(
      "%3d heads, %3d x %d of %5d%s: %zu chunks, %5zu tiles, spread %2d: kernel %7.1f us, with the sum "
      "%7.1f, %5.0f TFLOP/s, %5.0f GB/s",
      c.heads, c.batch, c.q_len, c.context, c.is_fp8 ? ", FP8" : "", plan.chunks.size(), plan.tiles.size(),
      plan.spread, kernel, both, operations / both * 1e-6, bytes / both * 1e-3);
  std::printf("\n");
  std::fflush(stdout);
  cudaStreamDestroy(stream);
}

const bool kernel_speed = [] {
  const auto add = [](const char* name, std::vector<KernelCase> cases) {
    add_cuda_test(std::string("speed of the attention kernel, ") + name, [cases = std::move(cases)] {
      const std::unique_ptr<Ops> gpu = make_gpu();  // sets the device and the kernels' limits
      for (const KernelCase& c : cases) time_kernel(c);
    });
  };
  add("128 heads", {{128, 1, 8192, 1},
                    {128, 8, 4096, 1},
                    {128, 32, 4096, 1},
                    {128, 128, 4096, 1},
                    {128, 32, 8192, 2},
                    {128, 128, 4096, 2}});
  add("16 heads", {{16, 1, 1024, 1},
                   {16, 1, 8192, 1},
                   {16, 32, 4096, 1},
                   {16, 128, 4096, 1},
                   {16, 128, 8192, 1},
                   {16, 32, 4096, 1, true},
                   {16, 128, 4096, 1, true},
                   {16, 128, 8192, 1, true},
                   {16, 32, 4096, 2, true},
                   {16, 128, 4096, 2, true},
                   {128, 32, 4096, 1, true}});
  std::vector<KernelCase> contexts;
  for (const int32_t context : {512, 520, 900, 1024, 1025, 1100, 1536, 2048, 2049, 4096, 4097})
    contexts.push_back({16, 1, context, 1});
  add("one sequence", contexts);
  return true;
}();

}  // namespace
}  // namespace rodin::test
