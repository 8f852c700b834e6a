// The one thread pool.
//
// parallel_for(tasks, threads, body) calls body(task) once for every task in 0..tasks-1, in any order, on the calling
// thread and at most threads - 1 sleeping workers. Results must not depend on which thread runs a task. The calling
// thread runs everything itself where threads is 1, where the pool is busy with another call, and in a forked child,
// which has no workers. The first exception of a body reaches the caller; tasks not yet begun are then dropped.
#pragma once

#include <atomic>
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

// parallel_for in which a thread begins with its own share of neighbouring tasks, the same one call after call, and
// then helps with the others': for tasks that do little but write, which is slow where another processor wrote last.
template <class Body>
void parallel_for_shares(int64_t tasks, int threads, Body&& body) {
  const int64_t shares = tasks < threads ? tasks : threads;
  if (shares <= 1) return parallel_for(tasks, threads, body);
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const std::unique_ptr<Share[]> share(new Share[shares]);
  for (int64_t s = 0; s < shares; ++s) {
    share[s].next = tasks * s / shares;
    share[s].end = tasks * (s + 1) / shares;
  }
  parallel_for(shares, threads, [&](int64_t own) {
    for (int64_t i = 0; i < shares; ++i) {
      Share& from = share[(own + i) % shares];
      for (int64_t task; (task = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;) body(task);
    }
  });
}

// Threads worth waking for so many bytes moved or multiply-adds done: a wake-up costs about 10 us.
inline int threads_for(int64_t work, int threads) {
  constexpr int64_t kWorkPerThread = 1 << 18;
  const int64_t useful = 1 + work / kWorkPerThread;
  return useful < threads ? static_cast<int>(useful) : threads;
}

}  // namespace pcl
