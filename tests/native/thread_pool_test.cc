#include "ops/cpu/thread_pool.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/resource.h>
#endif

#include "tests/native/test.h"

namespace rodin {
namespace {

// Many short loops, with pauses that let the workers yield and sleep: each task runs exactly once, workers
// have their own numbers, and the caller sees everything that was written.
void run_every_task_once(int num_threads) {
  ThreadPool pool(num_threads);
  std::vector<int> runs;  // [num_tasks]
  std::vector<std::atomic<int>> is_busy(static_cast<size_t>(num_threads));
  std::atomic<int> num_errors{0};
  uint32_t random = 12345;
  for (int loop = 0; loop < 20000; ++loop) {
    random = random * 1664525u + 1013904223u;
    const int64_t num_tasks = random >> 27;  // 0 .. 31
    runs.assign(static_cast<size_t>(num_tasks), 0);
    pool.parallel_for(num_tasks, [&](int64_t task, int worker) {
      if (worker < 0 || worker >= num_threads || is_busy[static_cast<size_t>(worker)].exchange(1) != 0)
        ++num_errors;
      ++runs[static_cast<size_t>(task)];
      is_busy[static_cast<size_t>(worker)].store(0);
    });
    for (int count : runs) CHECK_EQ(count, 1);
    if (loop % 4000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
    if (loop % 500 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random % 600));
  }
  CHECK_EQ(num_errors.load(), 0);
}

TEST("thread pool: every task once, 1 thread") { run_every_task_once(1); }
TEST("thread pool: every task once, 2 threads") { run_every_task_once(2); }
TEST("thread pool: every task once, 5 threads") { run_every_task_once(5); }

TEST("thread pool: all threads take part in one long loop") {
  ThreadPool pool(3);
  std::vector<std::atomic<int64_t>> tasks_of(3);
  std::atomic<int> num_started{0};
  pool.parallel_for(3, [&](int64_t, int worker) {
    ++tasks_of[static_cast<size_t>(worker)];
    ++num_started;
    while (num_started.load() < 3) std::this_thread::yield();  // ends only when three threads are inside
  });
  for (const auto& count : tasks_of) CHECK_EQ(count.load(), 1);
}

TEST("thread pool: a loop's sum is right with many tasks") {
  ThreadPool pool(4);
  std::vector<int64_t> partial(4);  // [num_threads]
  pool.parallel_for(1'000'000,
                    [&](int64_t task, int worker) { partial[static_cast<size_t>(worker)] += task; });
  CHECK_EQ(std::accumulate(partial.begin(), partial.end(), int64_t{0}), int64_t{499'999'500'000});
}

TEST("thread pool: pools come and go") {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(1 + i % 4);
    std::atomic<int> count{0};
    if (i % 3 != 0) pool.parallel_for(i, [&](int64_t, int) { ++count; });
    CHECK_EQ(count.load(), i % 3 != 0 ? i : 0);
  }
}

TEST("thread pool: no threads is an error") { CHECK_THROWS(ThreadPool(0), "at least 1 thread"); }

#if defined(__linux__)
TEST("thread pool: idle workers sleep") {
  const auto cpu_seconds = [] {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
  };
  ThreadPool pool(4);
  std::atomic<int> count{0};
  pool.parallel_for(100, [&](int64_t, int) { ++count; });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(cpu_seconds() - before < 0.02);
  pool.parallel_for(100, [&](int64_t, int) { ++count; });
  CHECK_EQ(count.load(), 200);
}
#endif

}  // namespace
}  // namespace rodin
