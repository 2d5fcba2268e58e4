// Weights on their way to the device: padded rows, device tables of the experts, the transposed half of kv_b.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <thread>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"

namespace rodin::cuda {
namespace {

constexpr int64_t kSmallBytes = 512 << 10;
constexpr int32_t kNoLimit = 1 << 30;  // rows or blocks that share one scale: all of them

int64_t padded_row_bytes(int64_t cols, Dtype dtype) { return (cols + 15) / 16 * 16 * dtype_bytes(dtype); }

}  // namespace

const WeightView& view_of(const Weight& weight) {
  check(weight.packed != nullptr, "a weight of shape [", weight.rows, ", ", weight.cols,
        "] was not placed on the GPU");
  return *static_cast<const WeightView*>(weight.packed);
}

Uploader& CudaOps::uploader() {
  if (!uploader_) {
    const auto cores = static_cast<int>(std::thread::hardware_concurrency());
    uploader_ = std::make_unique<Uploader>(device_id_, std::clamp(cores / 2, 1, 8));
  }
  return *uploader_;
}

void* CudaOps::upload_rows(const void* host, int64_t row_bytes, int64_t padded_bytes, int64_t rows) {
  RODIN_CUDA(cudaSetDevice(device_id_));
  // What is small lies together: a token's kernels read a little of it each, and each page that they have not
  // read for a while costs a walk through the page tables.
  DeviceArena& arena = padded_bytes * rows < kSmallBytes ? small_ : weights_;
  void* data = arena.alloc(static_cast<size_t>(padded_bytes * rows));
  uploader().copy(data, padded_bytes, host, row_bytes, rows);
  return data;
}

const float* CudaOps::place_vector(const float* host, int64_t size) {
  const int64_t bytes = size * static_cast<int64_t>(sizeof(float));
  return static_cast<const float*>(upload_rows(host, bytes, bytes, 1));
}

template <class T>
const T* CudaOps::upload_table(const std::vector<T>& table) {
  const auto bytes = static_cast<int64_t>(table.size() * sizeof(T));
  std::vector<char>& copy = tables_.emplace_back(static_cast<size_t>(bytes));
  memcpy(copy.data(), table.data(), copy.size());
  return static_cast<const T*>(upload_rows(copy.data(), bytes, bytes, 1));
}

void CudaOps::place(Weight& weight) {
  check(weight.rows <= kNoLimit && weight.cols <= kNoLimit, "a weight of shape [", weight.rows, ", ",
        weight.cols, "] is too large for the GPU backend");
  WeightView& view = views_.emplace_back();
  view.rows = static_cast<int32_t>(weight.rows);
  view.cols = static_cast<int32_t>(weight.cols);
  view.dtype = weight.dtype;
  view.row_bytes = padded_row_bytes(weight.cols, weight.dtype);
  if (weight.bias) weight.bias = view.bias = place_vector(weight.bias, weight.rows);
  if (weight.dtype == Dtype::kF8E4M3) {
    const bool has_scale = weight.scale != nullptr;
    const bool is_single = !has_scale || weight.scale_cols() == 1;
    const int64_t scale_rows = has_scale ? (weight.rows + weight.block_rows - 1) / weight.block_rows : 1;
    const int64_t scale_cols = has_scale ? weight.scale_cols() : 1;
    if (has_scale) {
      view.scale = place_vector(weight.scale, scale_rows * scale_cols);
    } else {
      if (!one_) one_ = upload_table(std::vector<float>{1.0f});
      view.scale = one_;
    }
    view.block_rows =
        has_scale ? static_cast<int32_t>(std::min<int64_t>(weight.block_rows, kNoLimit)) : kNoLimit;
    view.scale_cols = static_cast<int32_t>(scale_cols);
    view.blocks_per_scale = is_single ? kNoLimit : static_cast<int32_t>(weight.block_cols / kBlockK);
    if (!is_single && weight.block_cols % kBlockK != 0) {
      // The kernels change the scale at multiples of kBlockK only: such a matrix becomes bf16, scales
      // applied.
      const int64_t row_bytes = view.row_bytes;
      void* raw = device_alloc(static_cast<size_t>(row_bytes * weight.rows));
      uploader().copy(raw, row_bytes, weight.data, weight.cols, weight.rows);
      PendingWiden pending = {};
      pending.params.from = view;
      pending.params.from.data = raw;
      pending.params.scale = view.scale;
      pending.params.block_rows = view.block_rows;
      pending.params.block_cols = static_cast<int32_t>(weight.block_cols);
      pending.temporary = raw;
      view.scale = nullptr;
      view.dtype = Dtype::kBF16;
      view.row_bytes = padded_row_bytes(weight.cols, Dtype::kBF16);
      view.data = weights_.alloc(static_cast<size_t>(view.row_bytes * weight.rows));
      pending.params.to = const_cast<void*>(view.data);
      pending.params.to_row_bytes = view.row_bytes;
      widens_.push_back(pending);
    }
  }
  if (!view.data) {
    view.data =
        upload_rows(weight.data, weight.cols * dtype_bytes(weight.dtype), view.row_bytes, weight.rows);
  }
  weight.data = view.data;
  weight.scale = view.scale;
  weight.packed = &view;
}

void CudaOps::place_maps(const MoeWeights& moe, PlacedMoe& placed) {
  for (const MlpWeights& expert : moe.experts) {
    if (!has_boxes(expert)) return;
  }
  std::vector<TensorMap> gate, up, down, split_gate, split_up;  // [E + 1]
  const auto add = [&](const MlpWeights& expert) {
    gate.push_back(weight_map(view_of(expert.gate)));
    up.push_back(weight_map(view_of(expert.up)));
    down.push_back(weight_map(view_of(expert.down)));
    split_gate.push_back(weight_map(view_of(expert.gate), kSplitRows / 2));
    split_up.push_back(weight_map(view_of(expert.up), kSplitRows / 2));
  };
  for (const MlpWeights& expert : moe.experts) add(expert);
  placed.has_shared_maps = placed.is_shared_grouped && has_boxes(moe.shared);
  if (placed.has_shared_maps) add(moe.shared);
  placed.gate_maps = upload_table(gate);
  placed.up_maps = upload_table(up);
  placed.down_maps = upload_table(down);
  if (placed.is_shared_grouped && !placed.has_shared_maps) return;  // plans have the shared expert in them
  placed.split_gate_maps = upload_table(split_gate);
  placed.split_up_maps = upload_table(split_up);
}

void CudaOps::place(MoeWeights& moe) {
  Ops::place(moe);
  PlacedMoe& placed = moes_.emplace_back();
  std::vector<WeightView> gate, up, down;  // [E + 1]
  for (const MlpWeights& expert : moe.experts) {
    gate.push_back(view_of(expert.gate));
    up.push_back(view_of(expert.up));
    down.push_back(view_of(expert.down));
  }
  check(!gate.empty(), "a MoE layer without experts");
  placed.gate_dtype = gate[0].dtype;
  placed.down_dtype = down[0].dtype;
  for (size_t e = 0; e < gate.size(); ++e) {
    check(gate[e].dtype == placed.gate_dtype && up[e].dtype == placed.gate_dtype &&
              down[e].dtype == placed.down_dtype,
          "the routed experts of a layer have weights of different dtypes (expert ", e,
          "), which the GPU backend does not take; use --device cpu");
  }
  const auto is_alike = [](const WeightView& a, const WeightView& b) {
    return a.rows == b.rows && a.cols == b.cols && a.row_bytes == b.row_bytes && !a.bias && !b.bias &&
           a.block_rows == b.block_rows && a.blocks_per_scale == b.blocks_per_scale &&
           a.scale_cols == b.scale_cols;
  };
  placed.is_uniform = true;
  for (size_t e = 0; e < gate.size(); ++e)
    placed.is_uniform = placed.is_uniform && is_alike(gate[e], gate[0]) && is_alike(up[e], gate[0]) &&
                        is_alike(down[e], down[0]);
  if (moe.has_shared()) {
    const WeightView& shared_gate = view_of(moe.shared.gate);
    const WeightView& shared_up = view_of(moe.shared.up);
    const WeightView& shared_down = view_of(moe.shared.down);
    placed.is_shared_grouped = shared_gate.dtype == placed.gate_dtype &&
                               shared_up.dtype == placed.gate_dtype && shared_down.dtype == placed.down_dtype;
    gate.push_back(shared_gate);
    up.push_back(shared_up);
    down.push_back(shared_down);
  }
  place_maps(moe, placed);
  placed.gate = upload_table(gate);
  placed.up = upload_table(up);
  placed.down = upload_table(down);
  moe.packed = &placed;
}

// W_UK of head h, transposed to [lora_rank, nope_dim], so that the absorbed query is a linear layer. It stays
// FP8 where its scales change at multiples of kBlockK of nope_dim, and is widened to bf16 elsewhere.
void CudaOps::place(MlaWeights& mla) {
  Ops::place(mla);
  const MlaShape& shape = mla.shape;
  const WeightView& kv_b = view_of(mla.kv_b);
  check(shape.lora_rank <= kMlaMaxLora && (shape.latent_dim() + 63) / 64 * 64 <= kMlaMaxLatent,
        "kv_lora_rank ", shape.lora_rank, " with qk_rope_head_dim ", shape.rope_dim,
        " is more than the GPU's attention takes (", kMlaMaxLora, " and ", kMlaMaxLatent,
        " together); use --device cpu");
  PendingTranspose pending = {};
  pending.kv_b = kv_b;
  has_prefill_weights_ = has_prefill_weights_ && is_expandable(kv_b, shape);
  TransposeParams& params = pending.params;
  params.num_heads = static_cast<int32_t>(shape.num_heads);
  params.head_rows = static_cast<int32_t>(shape.nope_dim + shape.v_dim);
  params.nope_dim = static_cast<int32_t>(shape.nope_dim);
  params.lora_rank = static_cast<int32_t>(shape.lora_rank);

  WeightView view;
  view.dtype = kv_b.dtype;
  view.rows = static_cast<int32_t>(shape.num_heads * shape.lora_rank);
  view.cols = params.nope_dim;
  if (kv_b.dtype == Dtype::kF8E4M3) {
    for (int64_t h = 0; h < shape.num_heads; ++h) {
      const int64_t first = h * params.head_rows;
      for (int64_t row = first / kv_b.block_rows * kv_b.block_rows + kv_b.block_rows;
           row < first + shape.nope_dim; row += kv_b.block_rows) {
        if ((row - first) % kBlockK != 0) pending.is_widened = true;
      }
    }
    if (pending.is_widened) {
      view.dtype = Dtype::kBF16;
    } else {
      const int64_t from_cols = std::min<int64_t>(int64_t{kBlockK} * kv_b.blocks_per_scale, shape.lora_rank);
      params.to_block_rows = static_cast<int32_t>(std::gcd(shape.lora_rank, from_cols));
      params.to_scale_cols = static_cast<int32_t>((shape.nope_dim + kBlockK - 1) / kBlockK);
      const int64_t scale_rows = view.rows / params.to_block_rows;
      params.scale_to = static_cast<float*>(
          weights_.alloc(static_cast<size_t>(scale_rows * params.to_scale_cols) * sizeof(float)));
      view.scale = params.scale_to;
      view.block_rows = params.to_block_rows;
      view.scale_cols = params.to_scale_cols;
    }
  }
  view.row_bytes = padded_row_bytes(shape.nope_dim, view.dtype);
  params.to = weights_.alloc(static_cast<size_t>(view.row_bytes * view.rows));
  params.to_row_bytes = view.row_bytes;
  view.data = params.to;
  transposes_.push_back(pending);
  mlas_.push_back({view});
  mla.packed = &mlas_.back();
}

void CudaOps::widen_and_transpose(const PendingTranspose& pending) {
  TransposeParams params = pending.params;
  params.from = pending.kv_b;
  if (!pending.is_widened) return run_transpose_heads(params, stream_);
  WidenParams widen;
  widen.from = pending.kv_b;
  widen.scale = pending.kv_b.scale;
  widen.block_rows = pending.kv_b.block_rows;
  widen.block_cols = static_cast<int32_t>(
      std::min<int64_t>(int64_t{kBlockK} * pending.kv_b.blocks_per_scale, int64_t{kNoLimit}));
  widen.to_row_bytes = padded_row_bytes(pending.kv_b.cols, Dtype::kBF16);
  widen.to = device_alloc(static_cast<size_t>(widen.to_row_bytes * pending.kv_b.rows));
  run_widen(widen, stream_);
  params.from.data = widen.to;
  params.from.row_bytes = widen.to_row_bytes;
  params.from.dtype = Dtype::kBF16;
  run_transpose_heads(params, stream_);
  RODIN_CUDA(cudaStreamSynchronize(stream_));
  RODIN_CUDA(cudaFree(widen.to));
}

void CudaOps::finish_placing() {
  if (!uploader_) return;
  uploader_->drain();
  uploader_.reset();
  tables_.clear();
  for (const PendingWiden& widen : widens_) run_widen(widen.params, stream_);
  RODIN_CUDA(cudaStreamSynchronize(stream_));
  for (const PendingWiden& widen : widens_) RODIN_CUDA(cudaFree(widen.temporary));
  widens_.clear();
  for (const PendingTranspose& transpose : transposes_) widen_and_transpose(transpose);
  RODIN_CUDA(cudaStreamSynchronize(stream_));
  transposes_.clear();
}

}  // namespace rodin::cuda
