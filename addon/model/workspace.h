// Device memory for a forward's intermediate tensors, allocated once.
#pragma once

#include <cstddef>
#include <vector>

#include "ops/ops.h"

namespace rodin {

class Workspace {
 public:
  explicit Workspace(Ops& ops) : ops_(ops) {}
  ~Workspace() {
    for (void* buffer : buffers_) ops_.free(buffer);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // A new tensor, contents undefined; lives as long as the workspace.
  Tensor tensor(int64_t rows, int64_t cols, Dtype dtype) {
    const size_t bytes = static_cast<size_t>(rows) * static_cast<size_t>(cols * dtype_bytes(dtype));
    buffers_.push_back(ops_.alloc(bytes));
    bytes_ += bytes;
    return {buffers_.back(), dtype, rows, cols, cols};
  }

  size_t bytes() const { return bytes_; }

 private:
  Ops& ops_;
  std::vector<void*> buffers_;
  size_t bytes_ = 0;
};

}  // namespace rodin
