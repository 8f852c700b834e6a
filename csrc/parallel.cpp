#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace pcl {
namespace {

// How the calling thread computes with floating-point numbers (how it rounds, whether denormal ones are 0): its workers
// have to do alike, or results would depend on who ran a task.
class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() : bits_(__builtin_ia32_stmxcsr()) {}
  void set() const { __builtin_ia32_ldmxcsr(bits_); }

 private:
  unsigned bits_;
#elif defined(__aarch64__)
  FloatMode() { asm volatile("mrs %0, fpcr" : "=r"(bits_)); }
  void set() const { asm volatile("msr fpcr, %0" : : "r"(bits_)); }

 private:
  unsigned long bits_;
#else
  void set() const {}
#endif
};

struct Job {
  TaskBody body;
  void* context;
  int64_t tasks;
  FloatMode mode;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void work() noexcept {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      try {
        body(context, task);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(tasks, std::memory_order_relaxed);
      }
    }
  }
};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::atomic<bool> in_forked_child{false};

// Workers sleep until a job has seats left, take a seat, work, and leave. A worker that wakes after the job has closed
// finds no job and sleeps on: the caller never waits for one that has not begun.
class Pool {
 public:
  Pool() {
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });
  }

  bool try_run(Job& job, int threads) {
    if (!busy_.try_lock()) return false;
    const std::lock_guard<std::mutex> busy(busy_, std::adopt_lock);
    grow(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      seats_ = threads - 1;
    }
    for (int i = 1; i < threads; ++i) wake_.notify_one();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    if (working_ > 0) {
      lock.unlock();
      spin();
      lock.lock();
      done_.wait(lock, [this] { return working_ == 0; });
    }
    return true;
  }

 private:
  // The last tasks are nearly done when the caller runs out of them: falling asleep would take longer.
  void spin() const {
    for (int i = 0; i < 2000 && working_.load(std::memory_order_relaxed) > 0; ++i) pause();
  }

  void grow(int wanted) {
    while (size_ < wanted) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // the system has no more threads to give: fewer do the same work
      }
      ++size_;
    }
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ != nullptr && seats_ > 0; });
      Job& job = *job_;
      --seats_;
      ++working_;
      lock.unlock();
      job.mode.set();
      job.work();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;  // held by the caller whose job runs
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int seats_ = 0;
  std::atomic<int> working_{0};
  int size_ = 0;
};

Pool& pool() {
  static Pool& pool = *new Pool;  // never destroyed: its workers sleep until the process ends
  return pool;
}

}  // namespace

void parallel_run(int64_t tasks, int threads, TaskBody body, void* context) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads > 1 && !in_forked_child.load()) {
    Job job{body, context, tasks, {}, {}, {}, {}};
    if (pool().try_run(job, threads)) {
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

}  // namespace pcl
