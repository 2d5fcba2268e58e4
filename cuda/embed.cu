// Row copies: the embedding of each token in float32, also of one that the step before has sampled and the
// host does not know yet; gathered rows. One block a row.
#include "cuda/common.cuh"

namespace rodin::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) embed_kernel(const __grid_constant__ EmbedParams p) {
  let_successor_begin();
  const WeightView& w = p.table;
  // The step before has ended: this step's index arrays were copied behind it. What follows a row that came
  // out unusable is dropped, whatever it was made from.
  int64_t token_id = p.token_ids[blockIdx.x];
  if (token_id < 0) token_id = max(p.sampled[-1 - token_id].id, 0);
  const void* row = static_cast<const char*>(w.data) + token_id * w.row_bytes;
  const float* scales = w.scale ? w.scale + token_id / w.block_rows * w.scale_cols : nullptr;
  float* out = p.out + blockIdx.x * p.out_stride;
  wait_for_predecessor();
  for (int i = threadIdx.x; i < w.cols; i += kThreads) {
    const float value = element_as_float(row, w.dtype, i);
    out[i] = scales ? value * scales[i / kBlockK / w.blocks_per_scale] : value;
  }
}

// Unit: what one thread copies at a time; row_bytes and every row's address are multiples of it.
template <class Unit>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(const __grid_constant__ GatherParams p) {
  let_successor_begin();
  wait_for_predecessor();
  const Unit* from =
      reinterpret_cast<const Unit*>(static_cast<const char*>(p.from) + p.rows[blockIdx.x] * p.from_row_bytes);
  Unit* to = reinterpret_cast<Unit*>(static_cast<char*>(p.to) + blockIdx.x * p.to_row_bytes);
  const int64_t count = p.row_bytes / static_cast<int64_t>(sizeof(Unit));
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from[i];
}

}  // namespace

void run_embed(const EmbedParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  launch_overlapped(embed_kernel, dim3(static_cast<unsigned>(params.num_tokens)), kThreads, 0, stream, params,
                    "embed_kernel");
}

void run_gather_rows(const GatherParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const auto grid = static_cast<unsigned>(params.num_rows);
  const int64_t alignment = reinterpret_cast<int64_t>(params.from) | reinterpret_cast<int64_t>(params.to) |
                            params.from_row_bytes | params.to_row_bytes | params.row_bytes;
  const auto kernel = alignment % 16 == 0 ? gather_rows_kernel<uint4> : gather_rows_kernel<uint16_t>;
  launch_overlapped(kernel, dim3(grid), kThreads, 0, stream, params, "gather_rows_kernel");
}

}  // namespace rodin::cuda
