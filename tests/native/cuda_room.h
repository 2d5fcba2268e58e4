// Device memory for tests that call kernels' launchers: freed with its owner. Only where the kernels are
// built.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/cuda_check.h"

namespace rodin::test {

class DeviceRoom {
 public:
  explicit DeviceRoom(size_t bytes) : size_(bytes) {
    RODIN_CUDA(cudaMalloc(&data_, bytes), " of ", bytes, " bytes");
  }
  template <class T>
  explicit DeviceRoom(const std::vector<T>& values) : DeviceRoom(values.size() * sizeof(T)) {
    RODIN_CUDA(cudaMemcpy(data_, values.data(), size_, cudaMemcpyHostToDevice));
  }
  ~DeviceRoom() { cudaFree(data_); }
  DeviceRoom(const DeviceRoom&) = delete;
  DeviceRoom& operator=(const DeviceRoom&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::vector<uint8_t> bytes() const {
    std::vector<uint8_t> bytes(size_);
    RODIN_CUDA(cudaMemcpy(bytes.data(), data_, size_, cudaMemcpyDeviceToHost));
    return bytes;
  }

 private:
  const size_t size_;
  void* data_ = nullptr;
};

}  // namespace rodin::test
