// Threads that share one loop at a time. The caller takes part as worker 0, so num_threads = 1 starts none.
//
// Tasks are handed out by one atomic word (tasks taken, tasks in all); there is no lock while workers are
// awake. An idle worker spins briefly, then yields, then sleeps on a condition variable; a caller who waits
// for the last tasks spins, then sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

namespace rodin {

class ThreadPool {
 public:
  // Most tasks of one parallel_for.
  static constexpr int64_t kMaxTasks = (int64_t{1} << 31) - 1;

  // `name` is the worker threads' name as seen by the operating system.
  explicit ThreadPool(int num_threads, const std::string& name = "rodin-cpu");
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls fn(task, worker) once for each task in 0 .. num_tasks-1, in no fixed order, and returns when all
  // are done; worker is in 0 .. num_threads-1 and no two calls run at once with the same worker. One caller
  // at a time, no nested call, and fn must not throw. What the tasks wrote is visible to the caller.
  template <class F>
  void parallel_for(int64_t num_tasks, F&& fn) {
    using Fn = std::remove_reference_t<F>;
    if (num_threads_ == 1 || num_tasks <= 1) {
      for (int64_t task = 0; task < num_tasks; ++task) fn(task, 0);
      return;
    }
    run([](void* context, int64_t task, int worker) { (*static_cast<Fn*>(context))(task, worker); },
        const_cast<void*>(static_cast<const void*>(std::addressof(fn))), num_tasks);
  }

 private:
  using TaskFn = void (*)(void* context, int64_t task, int worker);

  void run(TaskFn fn, void* context, int64_t num_tasks);
  // Takes tasks until none is left; returns how many it ran.
  int64_t take_tasks(int worker);
  void worker_main(int worker);
  void wait_for_others(int64_t num_others);
  void count_completed(int64_t num_tasks);
  // Ends and joins the workers.
  void stop();
  bool has_work() const;

  const int num_threads_;
  TaskFn fn_ = nullptr;
  void* context_ = nullptr;
  // Low half: tasks taken so far; high half: tasks in all. Whoever takes a ticket below the total owns a
  // task of the current loop, which cannot end before that task is counted in completed_: fn_ and context_
  // are stable for it.
  alignas(64) std::atomic<uint64_t> tickets_{0};
  alignas(64) std::atomic<int64_t> completed_{0};
  alignas(64) std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::atomic<bool> is_caller_asleep_{false};
  std::condition_variable done_;
  uint64_t wake_generation_ = 0;      // guarded by sleep_mutex_
  std::vector<std::thread> workers_;  // [num_threads - 1]
};

}  // namespace rodin
