// Repacking of weights for the paths that take them packed. Where a weight's block scales do not fit the
// packed form, or the path takes none, the weight stays as it is and its products are float32.
#include "ops/cpu/cpu_ops.h"

namespace rodin {
namespace {

constexpr int64_t kMinPackBytes = 64 * 1024;  // that one task packs

// Whether the rows first .. first + rows - 1 lie in one row of block scales.
bool in_one_block(const Weight& weight, int64_t first, int64_t rows) {
  return !weight.scale || first / weight.block_rows == (first + rows - 1) / weight.block_rows;
}

}  // namespace

void CpuOps::place(Weight& weight) {
  if (!kernels_.to_bf16 || !can_pack(weight)) return;
  auto* packed = static_cast<char*>(arena_.take(packed_bytes(weight.rows, weight.cols, weight.dtype)));
  const int64_t one_panel_bytes = panel_bytes(kPanelOutputs, weight.cols, weight.dtype);
  const int64_t panels = ceil_div(weight.rows, kPanelOutputs);
  const int64_t per_task = ceil_div(kMinPackBytes, one_panel_bytes);
  pool_.parallel_for(ceil_div(panels, per_task), [&](int64_t task, int) {
    const int64_t first = task * per_task;
    const int64_t count = std::min(per_task, panels - first);
    const int64_t first_row = first * kPanelOutputs;
    const int64_t rows = std::min(count * kPanelOutputs, weight.rows - first_row);
    pack_rows(weight, first_row, rows, packed + first * one_panel_bytes);
    mark_rare_groups(weight.rows, weight.cols, weight.dtype, first, count, packed);
  });
  weight.packed = packed;
}

void CpuOps::place(MoeWeights& moe) {
  for (MlpWeights& expert : moe.experts) place(expert);
  if (moe.has_shared()) place(moe.shared);
}

// The absorbed form uses kv_b head by head: its keys' half transposed, and its values' half.
void CpuOps::place(MlaWeights& mla) {
  if (mla.q_a.present()) place(mla.q_a);
  place(mla.q_b);
  place(mla.kv_a);
  place(mla.o);
  const MlaShape& shape = mla.shape;
  if (caches_expanded(shape)) return place(mla.kv_b);
  const Weight& kv_b = mla.kv_b;
  if (!kernels_.to_bf16 || !can_pack(kv_b)) return;
  const int64_t head_rows = shape.nope_dim + shape.v_dim;
  for (int64_t head = 0; head < shape.num_heads; ++head) {
    const bool fits = in_one_block(kv_b, head * head_rows, shape.nope_dim) &&
                      in_one_block(kv_b, head * head_rows + shape.nope_dim, shape.v_dim);
    if (!fits) return;
  }
  PackedMla& packed = packed_mla_.emplace_back();
  const int64_t blocks = kv_b.scale_cols();
  packed.keys.resize(static_cast<size_t>(shape.num_heads));
  packed.values.resize(static_cast<size_t>(shape.num_heads));
  packed.scale.resize(static_cast<size_t>(shape.num_heads * blocks));
  for (int64_t head = 0; head < shape.num_heads; ++head) {
    const int64_t key_row = head * head_rows;
    Weight& key = packed.keys[static_cast<size_t>(head)];
    key.dtype = kv_b.dtype;
    key.rows = shape.lora_rank;
    key.cols = shape.nope_dim;
    Weight& value = packed.values[static_cast<size_t>(head)];
    value.dtype = kv_b.dtype;
    value.rows = shape.v_dim;
    value.cols = shape.lora_rank;
    if (kv_b.scale) {
      const float* from = kv_b.scale + key_row / kv_b.block_rows * blocks;
      float* scale = packed.scale.data() + head * blocks;
      std::copy_n(from, blocks, scale);
      key.scale = scale;  // [blocks, 1]
      key.block_rows = kv_b.block_cols;
      key.block_cols = shape.nope_dim;
      value.scale = kv_b.scale + (key_row + shape.nope_dim) / kv_b.block_rows * blocks;  // [1, blocks]
      value.block_rows = shape.v_dim;
      value.block_cols = kv_b.block_cols;
    }
    if (!can_pack(key) || !can_pack(value)) {
      packed_mla_.pop_back();
      return;
    }
    key.packed = arena_.take(packed_bytes(key.rows, key.cols, key.dtype));
    value.packed = arena_.take(packed_bytes(value.rows, value.cols, value.dtype));
  }
  pool_.parallel_for(shape.num_heads, [&](int64_t head, int) {
    const Weight& key = packed.keys[static_cast<size_t>(head)];
    const Weight& value = packed.values[static_cast<size_t>(head)];
    pack_columns(kv_b, head * head_rows, shape.nope_dim, const_cast<void*>(key.packed));
    mark_rare_groups(key.rows, key.cols, key.dtype, const_cast<void*>(key.packed));
    pack_rows(kv_b, head * head_rows + shape.nope_dim, shape.v_dim, const_cast<void*>(value.packed));
    mark_rare_groups(value.rows, value.cols, value.dtype, const_cast<void*>(value.packed));
  });
  mla.packed = &packed;
  mla.kv_b.packed = &packed;  // no product takes it as a whole
}

}  // namespace rodin
