#include "cuda/step_graph.h"

#include <algorithm>

#include "cuda/cuda_check.h"

namespace rodin::cuda {
namespace {

// Ends the capture also where the body throws, so that the stream is of use again.
cudaGraph_t record(cudaStream_t stream, const std::function<void()>& body) {
  cudaGraph_t graph = nullptr;
  RODIN_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  try {
    body();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  RODIN_CUDA(cudaStreamEndCapture(stream, &graph));
  return graph;
}

}  // namespace

StepGraphs::~StepGraphs() {
  for (auto& [shape, entry] : entries_) {
    if (entry.graph) cudaGraphExecDestroy(entry.graph);
  }
}

void StepGraphs::run(const StepShape& shape, cudaStream_t stream, const std::function<void()>& body) {
  const auto [found, is_new] = entries_.try_emplace(shape);
  Entry& entry = found->second;
  entry.last_use = ++now_;
  if (is_new) {
    // The first step also loads the kernels, which a capture could not do. The new entry is the youngest.
    if (entries_.size() > kMaxShapes) forget_oldest();
    return body();
  }
  if (!entry.graph) {
    const cudaGraph_t graph = record(stream, body);
    const cudaError_t error = cudaGraphInstantiate(&entry.graph, graph, 0);
    cudaGraphDestroy(graph);
    RODIN_CUDA(error, " of a step's graph");
    ++num_graphs_;
  }
  RODIN_CUDA(cudaGraphLaunch(entry.graph, stream));
}

void StepGraphs::forget_oldest() {
  const auto oldest = std::min_element(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) {
    return a.second.last_use < b.second.last_use;
  });
  if (oldest->second.graph) {
    cudaGraphExecDestroy(oldest->second.graph);  // returns when the graph has run
    --num_graphs_;
  }
  entries_.erase(oldest);
}

}  // namespace rodin::cuda
