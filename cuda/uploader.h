// Copies weights to the device while the loader goes on: reader threads fill pinned buffers, two each, so
// that reading the mapped file and the copy over the bus overlap.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace rodin::cuda {

class Uploader {
 public:
  Uploader(int device_id, int num_threads);
  // Drops what has not been copied.
  ~Uploader();
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;

  // Queues `rows` rows of `from_row_bytes` each, `to_row_bytes` apart on the device, with zeros between them.
  // `from` stays as it is until drain().
  void copy(void* to, int64_t to_row_bytes, const void* from, int64_t from_row_bytes, int64_t rows);
  // Returns when everything is on the device; throws the first error.
  void drain();

 private:
  static constexpr int64_t kBufferBytes = int64_t{8} << 20;

  struct Task {
    char* to;
    int64_t to_row_bytes;
    const char* from;
    int64_t from_row_bytes;
    int64_t rows;  // rows * to_row_bytes <= kBufferBytes
  };

  void worker_main();
  // Takes the next task; false when the uploader ends.
  bool take(Task& task);

  const int device_id_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;    // guarded by mutex_
  int64_t unfinished_ = 0;    // guarded: tasks queued or not yet handed to a stream
  bool is_ending_ = false;    // guarded
  std::exception_ptr error_;  // guarded: the first one
  std::vector<std::thread> threads_;
};

}  // namespace rodin::cuda
