#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <exception>
#include <mutex>

namespace pcl {
namespace {

// How the calling thread computes with floating-point numbers (how it rounds, whether denormal ones are 0): the others
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

// What compilers call for `#pragma omp parallel`; GNU's runtime has it, and so have those of LLVM and Intel.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;

  OpenMp() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) return;
    thread_num = reinterpret_cast<int (*)()>(dlsym(torch, "omp_get_thread_num"));
    if (thread_num) parallel = reinterpret_cast<decltype(parallel)>(dlsym(torch, "GOMP_parallel"));
  }
};

const OpenMp& open_mp() {
  static const OpenMp found;
  return found;
}

std::atomic<bool> in_forked_child{false};
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });

struct Team {
  int seats;
  SeatBody body;
  void* context;
  FloatMode mode;
  std::mutex error_mutex;
  std::exception_ptr error;

  void sit() noexcept {
    const int seat = open_mp().thread_num();
    if (seat >= seats) return;
    const FloatMode own;
    mode.set();
    try {
      body(context, seat);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    own.set();
  }
};

}  // namespace

bool has_threads() { return open_mp().parallel; }

void run_team(int seats, SeatBody body, void* context) {
  if (seats <= 1 || in_forked_child.load() || !has_threads()) return body(context, 0);
  Team team{seats, body, context, {}, {}, {}};
  // All threads that torch has, seats or not: a smaller team would end the others.
  open_mp().parallel([](void* team) { static_cast<Team*>(team)->sit(); }, &team, 0, 0);
  if (team.error) std::rethrow_exception(team.error);
}

}  // namespace pcl
