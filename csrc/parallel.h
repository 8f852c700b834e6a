// Sharing work among threads: those of the OpenMP runtime that torch computes with.
//
// Torch's threads wait awake for some milliseconds after each of its operations. Threads of our own would share the
// processors with them; a second OpenMP runtime would do so too. So we ask torch's own runtime, which is found when the
// first call needs it. The calling thread does everything itself where threads is 1, inside a parallel region, in a
// forked child, whose runtime has lost its threads, and where torch was built without OpenMP.
//
// Results must not depend on which thread runs what. The first exception of a body reaches the caller once all have
// ended; a thread that has thrown begins nothing more.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace pcl {

using SeatBody = void (*)(void* context, int seat);

// Whether torch's runtime was found.
bool has_threads();

// body(context, seat) for seat 0 and, as far as torch's runtime has that many threads, for 1..seats-1, each on a thread
// of its own, which computes with floating-point numbers as the caller does.
void run_team(int seats, SeatBody body, void* context);

template <class Body>
void run_team(int seats, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  run_team(
      seats, [](void* context, int seat) { (*static_cast<Plain*>(context))(seat); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

// Calls body(task) once for every task in 0..tasks-1, in any order.
template <class Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
  std::atomic<int64_t> next{0};
  run_team(static_cast<int>(std::min<int64_t>(tasks, threads)), [&](int) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
  });
}

// Calls body(first, count) for runs of `total`, of at most `most` and as few as one for each thread; all begin at a
// multiple of `step`.
template <class Body>
void parallel_runs(int64_t total, int64_t most, int64_t step, int threads, Body&& body) {
  const int64_t share = (total + threads - 1) / threads, run = std::min(most, (share + step - 1) / step * step);
  if (total <= 0) return;
  parallel_for((total + run - 1) / run, threads, [&](int64_t i) { body(i * run, std::min(run, total - i * run)); });
}

// parallel_for in which a thread begins with its own share of neighbouring tasks, the same one call after call, and
// then helps with the others': for tasks that do little but write, which is slow where another processor wrote last.
template <class Body>
void parallel_for_shares(int64_t tasks, int threads, Body&& body) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int shares = static_cast<int>(std::min<int64_t>(tasks, threads));
  if (shares <= 1) return parallel_for(tasks, threads, body);
  const std::unique_ptr<Share[]> share(new Share[shares]);
  for (int s = 0; s < shares; ++s) {
    share[s].next = tasks * s / shares;
    share[s].end = tasks * (s + 1) / shares;
  }
  run_team(shares, [&](int seat) {
    for (int i = 0; i < shares; ++i) {
      Share& from = share[(seat + i) % shares];
      for (int64_t task; (task = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;) body(task);
    }
  });
}

// Threads worth asking for where each should have at least so much of the work.
inline int threads_for(int64_t work, int64_t each, int threads) {
  const int64_t useful = 1 + work / each;
  return useful < threads ? static_cast<int>(useful) : threads;
}

// The same for so many bytes moved.
inline int threads_for_bytes(int64_t bytes, int threads) { return threads_for(bytes, 1 << 18, threads); }

// The same for products of so many multiply-adds, of which a thread gets some 70 us at least: one that sleeps takes
// milliseconds to wake, which a server of single requests would feel.
inline int threads_for_products(int64_t multiply_adds, int threads) {
  return threads_for(multiply_adds, 1 << 23, threads);
}

}  // namespace pcl
