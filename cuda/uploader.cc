#include "cuda/uploader.h"

#include <algorithm>
#include <cstring>

#include "cuda/cuda_check.h"
#include "cuda/device_memory.h"

namespace rodin::cuda {
namespace {

// Two pinned buffers and the stream that empties them; one of each thread.
struct Pipe {
  explicit Pipe(int64_t bytes) {
    RODIN_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2; ++i) {
      buffers[i] = static_cast<char*>(pinned_alloc(static_cast<size_t>(bytes)));
      RODIN_CUDA(cudaEventCreateWithFlags(&emptied[i], cudaEventDisableTiming));
    }
  }
  ~Pipe() {
    if (stream) cudaStreamSynchronize(stream);
    for (int i = 0; i < 2; ++i) {
      if (emptied[i]) cudaEventDestroy(emptied[i]);
      if (buffers[i]) cudaFreeHost(buffers[i]);
    }
    if (stream) cudaStreamDestroy(stream);
  }

  cudaStream_t stream = nullptr;
  char* buffers[2] = {};        // [2]
  cudaEvent_t emptied[2] = {};  // [2]
};

}  // namespace

Uploader::Uploader(int device_id, int num_threads) : device_id_(device_id) {
  for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { worker_main(); });
}

Uploader::~Uploader() {
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
    tasks_.clear();
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Uploader::copy(void* to, int64_t to_row_bytes, const void* from, int64_t from_row_bytes, int64_t rows) {
  std::vector<Task> added;
  auto* to_bytes = static_cast<char*>(to);
  const auto* from_bytes = static_cast<const char*>(from);
  if (to_row_bytes == from_row_bytes) {  // one dense run of bytes
    const int64_t total = from_row_bytes * rows;
    for (int64_t at = 0; at < total; at += kBufferBytes) {
      const int64_t bytes = std::min(kBufferBytes, total - at);
      added.push_back({to_bytes + at, bytes, from_bytes + at, bytes, 1});
    }
  } else {
    check(to_row_bytes <= kBufferBytes, "a weight row of ", from_row_bytes,
          " bytes is too long for the GPU's loader");
    const int64_t at_once = kBufferBytes / to_row_bytes;
    for (int64_t row = 0; row < rows; row += at_once) {
      added.push_back({to_bytes + row * to_row_bytes, to_row_bytes, from_bytes + row * from_row_bytes,
                       from_row_bytes, std::min(at_once, rows - row)});
    }
  }
  {
    const std::lock_guard lock(mutex_);
    tasks_.insert(tasks_.end(), added.begin(), added.end());
    unfinished_ += static_cast<int64_t>(added.size());
  }
  changed_.notify_all();
}

void Uploader::drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return unfinished_ == 0 || error_; });
  if (error_) std::rethrow_exception(error_);
  RODIN_CUDA(cudaDeviceSynchronize());  // the threads' last copies
}

bool Uploader::take(Task& task) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return is_ending_ || !tasks_.empty(); });
  if (tasks_.empty()) return false;
  task = tasks_.front();
  tasks_.pop_front();
  return true;
}

void Uploader::worker_main() {
  try {
    RODIN_CUDA(cudaSetDevice(device_id_));
    Pipe pipe(kBufferBytes);
    bool is_full[2] = {false, false};  // [2] a copy from this buffer has not been waited for
    Task task;
    for (int side = 0; take(task); side ^= 1) {
      if (is_full[side]) RODIN_CUDA(cudaEventSynchronize(pipe.emptied[side]));
      char* buffer = pipe.buffers[side];
      for (int64_t row = 0; row < task.rows; ++row) {
        char* at = buffer + row * task.to_row_bytes;
        memcpy(at, task.from + row * task.from_row_bytes, static_cast<size_t>(task.from_row_bytes));
        memset(at + task.from_row_bytes, 0, static_cast<size_t>(task.to_row_bytes - task.from_row_bytes));
      }
      RODIN_CUDA(cudaMemcpyAsync(task.to, buffer, static_cast<size_t>(task.rows * task.to_row_bytes),
                                 cudaMemcpyHostToDevice, pipe.stream));
      RODIN_CUDA(cudaEventRecord(pipe.emptied[side], pipe.stream));
      is_full[side] = true;
      {
        const std::lock_guard lock(mutex_);
        --unfinished_;
      }
      changed_.notify_all();
    }
  } catch (...) {
    {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      tasks_.clear();
    }
    changed_.notify_all();
  }
}

}  // namespace rodin::cuda
