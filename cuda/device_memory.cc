#include "cuda/device_memory.h"

#include <algorithm>
#include <cstring>

#include "cuda/cuda_check.h"

namespace rodin::cuda {

void* device_alloc(size_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes == 0 ? 1 : bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    RODIN_CUDA(cudaMemGetInfo(&free, &total));
    fail("the GPU is out of memory: ", bytes >> 20, " MiB were asked for and ", free >> 20, " of ",
         total >> 20, " MiB are free; lower the cache memory, the step size or the number of sequences");
  }
  RODIN_CUDA(error, " of ", bytes, " bytes");
  return data;
}

void* pinned_alloc(size_t bytes) {
  void* data = nullptr;
  RODIN_CUDA(cudaMallocHost(&data, bytes == 0 ? 1 : bytes), " of ", bytes, " bytes");
  return data;
}

DeviceArena::~DeviceArena() {
  for (void* slab : slabs_) cudaFree(slab);
}

void* DeviceArena::alloc(size_t bytes) {
  bytes = std::max<size_t>(bytes, 1);
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (bytes > left_) {
    // As much again as there is already, so that a small model does not take a large slab.
    const size_t slab = std::max(bytes, std::clamp(bytes_, kMinSlab, kMaxSlab));
    slabs_.reserve(slabs_.size() + 1);
    next_ = static_cast<char*>(device_alloc(slab));
    slabs_.push_back(next_);
    left_ = slab;
    bytes_ += slab;
  }
  void* data = next_;
  next_ += bytes;
  left_ -= bytes;
  return data;
}

StepArrays::~StepArrays() { release(); }

void StepArrays::release() {
  if (copied_) cudaEventDestroy(copied_);
  if (device_) cudaFree(device_);
  if (host_) cudaFreeHost(host_);
  copied_ = nullptr;
  device_ = nullptr;
  host_ = nullptr;
  capacity_ = 0;
}

void StepArrays::begin(size_t bytes) {
  used_ = 0;
  if (copied_) RODIN_CUDA(cudaEventSynchronize(copied_));
  if (bytes <= capacity_) return;
  if (device_) RODIN_CUDA(cudaDeviceSynchronize());  // kernels may still read the old one
  release();
  const size_t capacity = bytes + bytes / 2;
  RODIN_CUDA(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming));
  host_ = static_cast<char*>(pinned_alloc(capacity));
  device_ = static_cast<char*>(device_alloc(capacity));
  capacity_ = capacity;
}

const void* StepArrays::add_bytes(const void* host, size_t bytes) {
  check(used_ + bytes <= capacity_, "the arrays of a step need more than the ", capacity_, " bytes foreseen");
  void* at = device_ + used_;
  if (bytes != 0) memcpy(host_ + used_, host, bytes);
  used_ = (used_ + bytes + 15) / 16 * 16;
  return at;
}

void StepArrays::flush(cudaStream_t stream) {
  if (used_ == 0) return;
  const size_t bytes = std::min(used_, capacity_);
  RODIN_CUDA(cudaMemcpyAsync(device_, host_, bytes, cudaMemcpyHostToDevice, stream), " of ", bytes, " bytes");
  RODIN_CUDA(cudaEventRecord(copied_, stream));
}

}  // namespace rodin::cuda
