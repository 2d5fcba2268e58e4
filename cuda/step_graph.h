// Recorded steps: what a decode step enqueues, as a CUDA graph for each shape of step, so that a step costs
// one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

namespace rodin::cuda {

// Everything a launch depends on that is not read from device memory: two steps with equal shapes enqueue the
// same kernels with the same arguments.
using StepShape = std::vector<int64_t>;

class StepGraphs {
 public:
  StepGraphs() = default;
  ~StepGraphs();
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  // Enqueues what `body` enqueues on `stream`: calls it for a shape's first step, records it in the second,
  // replays from then on.
  void run(const StepShape& shape, cudaStream_t stream, const std::function<void()>& body);
  int64_t num_graphs() const { return num_graphs_; }

 private:
  struct Entry {
    cudaGraphExec_t graph = nullptr;  // null until recorded
    int64_t last_use = 0;
  };

  static constexpr size_t kMaxShapes = 512;  // the least recently used one goes

  void forget_oldest();

  std::map<StepShape, Entry> entries_;
  int64_t now_ = 0;
  int64_t num_graphs_ = 0;
};

}  // namespace rodin::cuda
