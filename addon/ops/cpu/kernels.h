// The inner loops of CpuOps, one table of functions per instruction path. Each path is one translation unit
// compiled with its own flags, so nothing here or in kernels_*.h may be an inline function with external
// linkage: the linker would keep one copy for all.
//
// Batch invariance: an output element is computed by the same operations in the same order whatever m, the
// row's place in the batch, or the split of the work into calls.
#pragma once

#include <cstdint>

#include "ops/weight.h"

namespace rodin {

// Keys of one attention tile, and the alignment of tiles to absolute positions.
constexpr int64_t kKeyTile = 64;
// Query rows of one call of attend: heads of one token.
constexpr int64_t kQueryTile = 4;
// The same of a path with a query_tile of its own, at most.
constexpr int64_t kMaxQueryTile = 16;
// Weight rows that `linear` widens at once when there are many tokens.
constexpr int64_t kPanelRows = 16;
// Elements that a row of a panel takes are rounded up to this.
constexpr int64_t kPanelAlign = 32;
// Elements that a panel has at least.
constexpr int64_t kMinPanelFloats = 24 * 1024;

// out[t][n - out_row0] = bias[n] + sum_k weight[n][k] * x[t][k] for n in row0 .. row0 + rows - 1.
struct LinearArgs {
  const Weight* weight = nullptr;
  int64_t row0 = 0;
  int64_t rows = 0;
  const float* const* x = nullptr;  // [m] rows of [cols]
  // The same rows rounded to bf16, zeros after the last column; read in place of x where the weight is
  // packed, and row0 is then a multiple of 16. Null: the products are float32.
  const uint16_t* const* x_bf16 = nullptr;  // [m] rows of [cols rounded up to 32]
  float* const* out = nullptr;              // [m]
  int64_t out_row0 = 0;
  int64_t m = 0;
  // Packed rows that the next call begins with, brought near meanwhile; null: none. `next_panel_bytes` apart.
  const char* next_panels = nullptr;
  int64_t next_panel_bytes = 0;
  float* panel = nullptr;  // [kPanelRows, cols rounded up to kPanelAlign], kMinPanelFloats: working memory
};

// out[t][c] = factor * sum_d a[t][d] * weight[row0 + d][c] for d in 0 .. rows - 1 and every column c.
struct AbsorbArgs {
  const Weight* weight = nullptr;
  int64_t row0 = 0;
  int64_t rows = 0;
  const float* const* a = nullptr;  // [m] rows of [rows]
  float* const* out = nullptr;      // [m] rows of [cols]
  int64_t m = 0;
  float factor = 1;
  float* scaled = nullptr;  // [4, rows] working memory
  float* panel = nullptr;   // [rows, cols] working memory
};

// One tile of absorbed attention for some heads of one token. Over keys j = first .. end - 1:
//   s_j = q . key_j, max = max_j s_j, sum = sum_j exp(s_j - max), out = sum_j exp(s_j - max) *
//   key_j[:lora_rank]
struct AttendArgs {
  const float* const* q = nullptr;  // [num_rows] rows of [latent_dim], softmax scale applied
  int64_t num_rows = 0;             // 1 .. query_tile
  // Cache rows of [latent_dim]; one outside first .. end - 1 stands for a row inside, and its weight becomes
  // 0.
  const uint16_t* const* keys = nullptr;  // [kKeyTile]
  int64_t first = 0;
  int64_t end = 0;
  // Rows that are attended to soon, brought near meanwhile; null: none.
  const uint16_t* const* next_keys = nullptr;  // [kKeyTile] cache rows of [latent_dim]
  int64_t latent_dim = 0;
  int64_t lora_rank = 0;
  uint16_t* scratch = nullptr;  // [kMaxQueryTile + kKeyTile, latent_dim rounded up to 32] working memory
  bool has_queries = false;     // whether the last call with this scratch had the same q
  float* const* out = nullptr;  // [num_rows] rows of [lora_rank]
  float* max = nullptr;         // [num_rows]
  float* sum = nullptr;         // [num_rows]
};

// One tile of grouped-query attention for query rows that share a kv head and see the same keys, over keys
// j = first .. end - 1: s_j = scale * q . key_j, then max, sum and out (of value_j) as above.
struct AttendGqaArgs {
  const float* const* q = nullptr;  // [num_rows] rows of [head_dim]
  int64_t num_rows = 0;             // any number
  const uint16_t* const* keys =
      nullptr;           // [kKeyTile] cache rows of [head_dim]; only first .. end - 1 are read
  int64_t value_at = 0;  // value_j = key_j + value_at
  int64_t first = 0;
  int64_t end = 0;
  int64_t head_dim = 0;
  float scale = 1;
  float* const* out = nullptr;  // [num_rows] rows of [head_dim]
  float* max = nullptr;         // [num_rows]
  float* sum = nullptr;         // [num_rows]
};

// Keys that lie together where keys and values are cached expanded, and such groups of a tile.
constexpr int64_t kKeyGroup = 16;
constexpr int kTileGroups = static_cast<int>(kKeyTile / kKeyGroup);

// What a group holds: nope parts of all heads, rotated keys, values of all heads. How their elements are
// ordered is the path's affair; offsets are in elements.
struct ExpandedLayout {
  int64_t num_heads = 0;  // A
  int64_t nope_dim = 0;
  int64_t rope_dim = 0;  // even
  int64_t v_dim = 0;

  int64_t nope_room() const { return nope_dim + nope_dim % 2; }
  int64_t values() const { return num_heads * v_dim; }
  int64_t nope_at(int64_t head) const { return kKeyGroup * head * nope_room(); }
  int64_t rope_at() const { return nope_at(num_heads); }
  int64_t value_at() const { return rope_at() + kKeyGroup * rope_dim; }
  // Elements of one position.
  int64_t row_dim() const { return num_heads * (nope_room() + v_dim) + rope_dim; }
};

// One tile of attention over expanded keys and values for all heads h of one token, over keys
// j = first .. end - 1: s_j = q_h . [nope_h(j) | rope(j)], then max, sum and out (of value_h(j)) as above.
struct AttendExpandedArgs {
  ExpandedLayout layout;
  const float* q = nullptr;  // [A, nope_dim + rope_dim], softmax scale applied
  // A group without a key first .. end - 1 stands for one with some; of the other keys' values none is read.
  const uint16_t* const* groups = nullptr;  // [kTileGroups]
  int64_t first = 0;
  int64_t end = 0;
  // Groups that are attended to soon, brought near meanwhile; null: none.
  const uint16_t* const* next_groups = nullptr;  // [kTileGroups]
  uint16_t* scratch = nullptr;  // [4, nope_dim and rope_dim rounded up to 32 each] working memory
  float* out = nullptr;         // [A, v_dim]
  float* max = nullptr;         // [A]
  float* sum = nullptr;         // [A]
};

// Copies a key and its values to their lane of a group.
struct GroupKeyArgs {
  ExpandedLayout layout;
  const uint16_t* row = nullptr;  // [A, nope_room | rope_dim | A, v_dim]
  uint16_t* group = nullptr;
  int64_t lane = 0;
};

constexpr int kProbeProducts = 16;

struct Kernels {
  const char* name;
  Dtype cache_dtype;  // kF16 or kBF16
  void (*linear)(const LinearArgs& args);
  void (*absorb)(const AbsorbArgs& args);
  void (*attend)(const AttendArgs& args);
  // Adds the result of a later tile to that of the tiles before it: (out, max, sum) <- both. out, part: [n]
  void (*combine)(float* out, float* max, float* sum, const float* part, float part_max, float part_sum,
                  int64_t n);
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);  // out may be x
  void (*add)(float* x, const float* y, int64_t n);                                         // x += y
  void (*scale)(const float* x, float factor, int64_t n, float* out);                       // out may be x
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* out);              // out may be gate
  void (*sigmoid)(float* x, int64_t n);
  void (*softmax)(float* x, int64_t n);
  // out = sum_j weights[j] * y[j], j ascending, then + shared unless null. y: [num] rows of [n]
  void (*weighted_sum)(const float* const* y, const float* weights, int64_t num, const float* shared,
                       int64_t n, float* out);
  void (*widen_row)(const Weight& weight, int64_t row, float* out);  // block scales applied; [cols]
  void (*to_cache)(const float* x, int64_t n, uint16_t* out);        // rounds to cache_dtype
  void (*attend_gqa)(const AttendGqaArgs& args);
  void (*attend_expanded)(const AttendExpandedArgs& args);
  void (*group_key)(const GroupKeyArgs& args);
  // `n` times kProbeProducts independent vector products in registers, and how many flops one of them is:
  // what `linear` could reach. The result is written so that they are not left out.
  void (*probe)(int64_t n, float* out);  // out: [16]
  int64_t probe_flops;
  // Reads n floats, a multiple of 256, as fast as it can; the result is a sum of them.
  float (*read)(const float* data, int64_t n);
  // Only paths that take packed weights (packed_weight.h) have this: rounds n inputs to bf16, with zeros
  // after them up to a multiple of 4. Null elsewhere.
  void (*to_bf16)(const float* x, int64_t n, uint16_t* out);
  // Whether the rows of x_bf16 must be equally far apart.
  bool needs_rows_in_line;
  // Query rows of one call of attend: at most kMaxQueryTile.
  int64_t query_tile;
  // attend_expanded for two tokens that differ in q, end, out, max and sum, the earlier one first, with each
  // key read once. Null: to be called one by one.
  void (*attend_expanded_two)(const AttendExpandedArgs& earlier, const AttendExpandedArgs& later) = nullptr;
};

const Kernels& kernels_portable();
const Kernels& kernels_avx2();        // x86-64 only
const Kernels& kernels_avx512();      // x86-64 only
const Kernels& kernels_avx512bf16();  // x86-64 only
const Kernels& kernels_amxbf16();     // x86-64 only

}  // namespace rodin
