// A matrix of BF16, F16 or F32 made FP8 at loading: e4m3 with a float32 scale for each block of 128x128, as
// V3 checkpoints store theirs. A block's largest value becomes 448; each other is rounded to the nearest
// code.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/synthetic.h"
#include "ops/weight.h"

namespace rodin {

class QuantizedMatrix {
 public:
  // Reads `from` on num_threads threads. Throws where it holds a value that is not finite; `name` says whose.
  QuantizedMatrix(const Weight& from, int num_threads, const char* name);

  // Valid as long as the object.
  const Weight& view() const { return view_; }
  int64_t bytes() const;

 private:
  static constexpr int64_t kBlock = 128;

  // Whether all values of this row of blocks are finite.
  bool quantize_rows(const Weight& from, int64_t block_row);

  AnonymousMemory codes_;      // [rows, cols]
  std::vector<float> scales_;  // [ceil(rows / kBlock), ceil(cols / kBlock)]
  Weight view_;
};

}  // namespace rodin
