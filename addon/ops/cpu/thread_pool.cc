#include "ops/cpu/thread_pool.h"

#include <chrono>
#include <stdexcept>

#if defined(__linux__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rodin {
namespace {

// How long an idle worker stays awake. Gaps inside a step are a few microseconds (spin); between two steps
// the scheduler runs for tens to hundreds (yield: the core is free for it).
constexpr std::chrono::microseconds kSpinTime{30};
constexpr std::chrono::microseconds kYieldTime{400};
// How long the caller stays awake for the last tasks of a loop.
constexpr std::chrono::microseconds kCallerSpinTime{60};
constexpr int kPausesPerCheck = 8;

inline void cpu_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void set_thread_name([[maybe_unused]] const std::string& name) {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, const std::string& name) : num_threads_(num_threads) {
  if (num_threads < 1) throw std::runtime_error("a thread pool needs at least 1 thread");
  workers_.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (int worker = 1; worker < num_threads; ++worker) {
      workers_.emplace_back([this, worker, name] {
        set_thread_name(name);
        worker_main(worker);
      });
    }
  } catch (...) {
    stop();
    throw std::runtime_error("cannot start " + std::to_string(num_threads) + " compute threads");
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stopping_.store(true);
    ++wake_generation_;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

bool ThreadPool::has_work() const {
  const uint64_t tickets = tickets_.load(std::memory_order_seq_cst);
  return (tickets & 0xffffffffu) < (tickets >> 32);
}

int64_t ThreadPool::take_tasks(int worker) {
  int64_t done = 0;
  // has_work() first: a ticket taken past the end must not wrap into the other half.
  while (has_work()) {
    const uint64_t tickets = tickets_.fetch_add(1, std::memory_order_acq_rel);
    const uint64_t task = tickets & 0xffffffffu;
    if (task >= tickets >> 32) break;
    fn_(context_, static_cast<int64_t>(task), worker);
    ++done;
  }
  return done;
}

void ThreadPool::run(TaskFn fn, void* context, int64_t num_tasks) {
  if (num_tasks > kMaxTasks) throw std::runtime_error("too many tasks in one parallel loop");
  fn_ = fn;
  context_ = context;
  completed_.store(0, std::memory_order_relaxed);
  // Sequentially consistent, like the sleeper's increment: either this thread sees the sleeper or the
  // sleeper sees the work.
  tickets_.store(static_cast<uint64_t>(num_tasks) << 32, std::memory_order_seq_cst);
  if (num_sleeping_.load(std::memory_order_seq_cst) > 0) {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      num_sleeping_.store(0);
      ++wake_generation_;
    }
    wake_.notify_all();
  }
  int64_t done = take_tasks(0);
  wait_for_others(num_tasks - done);
}

// The last tasks run elsewhere. They take microseconds where their threads have a core; where one has lost
// its core in the middle of a task, it can only go on if this thread leaves its own to it: a core whose
// thread yields is busy, and is given no other to run, but one whose thread sleeps is.
void ThreadPool::wait_for_others(int64_t num_others) {
  using Clock = std::chrono::steady_clock;
  const auto is_done = [&] { return completed_.load(std::memory_order_seq_cst) == num_others; };
  const auto end = Clock::now() + kCallerSpinTime;
  while (!is_done()) {
    for (int i = 0; i < kPausesPerCheck && !is_done(); ++i) cpu_pause();
    if (Clock::now() < end) continue;
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    // Either this thread sees the last count or whoever counts last sees that it sleeps.
    is_caller_asleep_.store(true, std::memory_order_seq_cst);
    done_.wait(lock, is_done);
    is_caller_asleep_.store(false, std::memory_order_relaxed);
  }
}

void ThreadPool::count_completed(int64_t num_tasks) {
  completed_.fetch_add(num_tasks, std::memory_order_seq_cst);
  if (!is_caller_asleep_.load(std::memory_order_seq_cst)) return;
  { std::lock_guard<std::mutex> lock(sleep_mutex_); }
  done_.notify_one();
}

void ThreadPool::worker_main(int worker) {
  using Clock = std::chrono::steady_clock;
  auto idle_since = Clock::now();
  while (!stopping_.load(std::memory_order_relaxed)) {
    const int64_t done = take_tasks(worker);
    if (done > 0) {
      count_completed(done);
      idle_since = Clock::now();
      continue;
    }
    const auto idle = Clock::now() - idle_since;
    if (idle < kSpinTime) {
      for (int i = 0; i < kPausesPerCheck && !has_work(); ++i) cpu_pause();
    } else if (idle < kYieldTime) {
      std::this_thread::yield();
    } else {
      std::unique_lock<std::mutex> lock(sleep_mutex_);
      num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
      if (!has_work() && !stopping_.load()) {
        const uint64_t generation = wake_generation_;
        wake_.wait(lock, [&] { return wake_generation_ != generation; });
      } else {
        num_sleeping_.fetch_sub(1);
      }
      idle_since = Clock::now();
    }
  }
}

}  // namespace rodin
