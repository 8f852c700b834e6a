// The one thread pool.
//
// parallel_for(tasks, threads, body) calls body(task) once for every task in 0..tasks-1, in any order, on the calling
// thread and at most threads - 1 sleeping workers. Results must not depend on which thread runs a task. The calling
// thread runs everything itself where threads is 1, where the pool is busy with another call, and in a forked child,
// which has no workers. The first exception of a body reaches the caller; tasks not yet begun are then dropped.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace pcl {

using TaskBody = void (*)(void* context, int64_t task);

void parallel_run(int64_t tasks, int threads, TaskBody body, void* context);

template <class Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  parallel_run(
      tasks, threads, [](void* context, int64_t task) { (*static_cast<Plain*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

// Threads worth waking for so many bytes moved or multiply-adds done: a wake-up costs about 10 us.
inline int threads_for(int64_t work, int threads) {
  constexpr int64_t kWorkPerThread = 1 << 18;
  const int64_t useful = 1 + work / kWorkPerThread;
  return useful < threads ? static_cast<int>(useful) : threads;
}

}  // namespace pcl
