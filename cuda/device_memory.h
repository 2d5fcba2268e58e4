// Device memory for weights, cut from large slabs, and the per-step arrays that travel from the host in one
// copy.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rodin::cuda {

// Throws one sentence with the numbers when the device has no more memory.
void* device_alloc(size_t bytes);
// Page-locked host memory; freed with cudaFreeHost.
void* pinned_alloc(size_t bytes);

// Never gives anything back before its end.
class DeviceArena {
 public:
  DeviceArena() = default;
  ~DeviceArena();
  DeviceArena(const DeviceArena&) = delete;
  DeviceArena& operator=(const DeviceArena&) = delete;

  // 256-byte aligned.
  void* alloc(size_t bytes);
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 256;
  static constexpr size_t kMinSlab = size_t{4} << 20;
  static constexpr size_t kMaxSlab = size_t{256} << 20;

  std::vector<void*> slabs_;
  char* next_ = nullptr;
  size_t left_ = 0;
  size_t bytes_ = 0;  // of all slabs
};

// A pinned buffer and its twin on the device. begin(), add() .., flush(): one asynchronous copy. Grows where
// a step needs more than was foreseen; that is the only allocation that can happen in a step.
class StepArrays {
 public:
  StepArrays() = default;
  ~StepArrays();
  StepArrays(const StepArrays&) = delete;
  StepArrays& operator=(const StepArrays&) = delete;

  // Waits until the last copy has read the pinned buffer; then there is room for `bytes` in all, where each
  // add() takes up to 15 bytes more than its array.
  void begin(size_t bytes);
  // Where the array will be on the device after flush().
  template <class T>
  const T* add(const T* host, int64_t count) {
    return static_cast<const T*>(add_bytes(host, static_cast<size_t>(count) * sizeof(T)));
  }
  void flush(cudaStream_t stream);
  size_t capacity() const { return capacity_; }

 private:
  const void* add_bytes(const void* host, size_t bytes);
  void release();

  char* host_ = nullptr;    // [capacity_] pinned
  char* device_ = nullptr;  // [capacity_]
  cudaEvent_t copied_ = nullptr;
  size_t capacity_ = 0;
  size_t used_ = 0;
};

}  // namespace rodin::cuda
