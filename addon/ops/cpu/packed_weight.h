// Weights repacked once, when they are placed, so that one load brings what one instruction multiplies:
// panels of 16 outputs; in a panel, for every 4 inputs, the pairs (k, k+1) of all 16 outputs and the pairs
// (k+2, k+3). Zeros after the last input and the last output.
//   BF16: [panels, cols / 4, 2 pairs, 16 outputs, 2 inputs], the rows of an AMX tile
//   FP8:  [panels, cols / 4, 16 outputs, 2 inputs, 2 pairs], the second pair first: a 16-bit word has a code
//   of
//         either of the two rows of the above. Behind the panels [panels, groups / 64 rounded up] words of 64
//         bits: one bit for each 4 inputs of a panel, set where some code is a denormal or zero, which takes
//         more to widen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/weight.h"

namespace rodin {

constexpr int64_t kPanelOutputs = 16;
constexpr int64_t kPackInputs = 4;

// Whether the products of a weight's packed form can be told apart by its block scales.
bool can_pack(const Weight& weight);
// Bytes of the panels of a matrix, and of its whole packed form.
int64_t panel_bytes(int64_t rows, int64_t cols, Dtype dtype);
int64_t packed_bytes(int64_t rows, int64_t cols, Dtype dtype);
// Words that a panel has behind the panels.
static inline int64_t rare_words(int64_t cols) { return (cols + kPackInputs * 64 - 1) / (kPackInputs * 64); }
// Sets the words that panels first .. first + count - 1 of a packed matrix [rows, cols] have behind all
// panels, once those panels are there.
void mark_rare_groups(int64_t rows, int64_t cols, Dtype dtype, int64_t first, int64_t count, void* packed);
// Those of all panels.
void mark_rare_groups(int64_t rows, int64_t cols, Dtype dtype, void* packed);
// The rows first .. first + rows - 1 of `weight`, packed. Panels may be packed one by one: `first` is then
// that of the panel, and `packed` where the panel goes.
void pack_rows(const Weight& weight, int64_t first, int64_t rows, void* packed);
// The transposed matrix of those rows, packed: its outputs are the weight's columns.
void pack_columns(const Weight& weight, int64_t first, int64_t rows, void* packed);

// Memory that is handed out piece by piece and freed as a whole, in huge pages where the system has some.
class PageArena {
 public:
  PageArena() = default;
  ~PageArena();
  PageArena(const PageArena&) = delete;
  PageArena& operator=(const PageArena&) = delete;

  // 64-byte aligned; throws where there is no memory.
  void* take(int64_t bytes);

 private:
  struct Chunk {
    char* data;
    int64_t bytes;
  };
  std::vector<Chunk> chunks_;
  int64_t used_ = 0;  // of the last chunk
};

}  // namespace rodin
