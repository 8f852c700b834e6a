#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "fiber.h"

namespace pcl::emulated {

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMostThreads = 1024;
constexpr unsigned kMostBlocks = 0x7fffffff, kMostBlocksAcross = 65535;
constexpr int kInvalidValue = 1;

enum class State { kReady, kInWarp, kInBlock, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  Place place;
  Fiber fiber;
  State state;
  const char* name;
  int line;
  void (*work)(void* const*);
  void* argument;
  std::vector<std::vector<Copy>> groups;  // of copies, oldest first; the last is not committed yet
};

struct FreeLater {
  void operator()(unsigned char* memory) const { std::free(memory); }
};

// One a system thread; stacks are used again by the next launch.
struct Machine {
  std::vector<Thread> threads;
  std::unique_ptr<unsigned char, FreeLater> stacks;
  size_t num_stacks = 0;
  Thread* running = nullptr;
  const Launch* launch = nullptr;
  unsigned char* shared = nullptr;
  std::mt19937 random;
};

thread_local Machine machine;
int chosen_order = 0, most_shared = 163 * 1024, last_shared = 0, given_answer = 0;

[[noreturn]] void fail(const Thread& thread, const char* format, ...) {
  const Place& at = thread.place;
  std::fprintf(stderr, "emulated kernel: thread %d of block (%u, %u, %u) ", at.thread, at.block_x, at.block_y,
               at.block_z);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

const char* whereabouts(const Thread& thread) { return thread.state == State::kDone ? "its end" : thread.name; }

[[noreturn]] void fail_apart(const Thread& a, const Thread& b) {
  fail(a, "is at %s (line %d) while thread %d is at %s (line %d)", whereabouts(a), a.line, b.place.thread,
       whereabouts(b), b.line);
}

bool together(const Thread& a, const Thread& b) {
  return a.state == b.state && a.line == b.line && std::strcmp(whereabouts(a), whereabouts(b)) == 0;
}

void thread_body(void* argument) {
  auto* thread = static_cast<Thread*>(argument);
  machine.launch->body(machine.launch->argument);
  for (const auto& group : thread->groups) {
    if (!group.empty()) fail(*thread, "ends without waiting for its copies to shared memory");
  }
  thread->state = State::kDone;
  thread->line = 0;
}

void meet(Thread& thread, State state, const char* name, int line) {
  thread.state = state;
  thread.name = name;
  thread.line = line;
  thread.fiber.stop();
}

std::vector<int> order_of(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (chosen_order == 1) std::reverse(order.begin(), order.end());
  if (chosen_order > 1) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

// Until all its lanes are at a meeting of the block, or at their end.
void run_warp(Thread* lanes) {
  while (true) {
    for (const int i : order_of(kLanes)) {
      machine.running = &lanes[i];
      lanes[i].fiber.resume();
    }
    for (int i = 1; i < kLanes; ++i) {
      if (!together(lanes[i], lanes[0])) fail_apart(lanes[i], lanes[0]);
    }
    if (lanes[0].state != State::kInWarp) return;
    void* arguments[kLanes];
    for (int i = 0; i < kLanes; ++i) arguments[i] = lanes[i].argument;
    if (lanes[0].work != nullptr) lanes[0].work(arguments);
  }
}

void begin_thread(Thread& thread, const Place& place, unsigned char* stack) {
  thread.place = place;
  thread.state = State::kReady;
  thread.name = "its begin";
  thread.line = 0;
  thread.groups.assign(1, {});
  thread.fiber.begin(thread_body, &thread, stack, kStackBytes);
}

// Exactly as long as asked for, and full of NaN.
unsigned char* new_shared(int bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max(bytes, 1)) != 0) std::abort();
  std::memset(memory, 0xff, bytes);
  return static_cast<unsigned char*>(memory);
}

void run_block(const Launch& launch, unsigned x, unsigned y, unsigned z) {
  const std::unique_ptr<unsigned char, FreeLater> memory(new_shared(launch.shared_bytes));
  machine.shared = memory.get();
  for (int i = 0; i < launch.threads; ++i) {
    const Place place{x, y, z, i, launch.threads, launch.grid_x, launch.grid_y, launch.grid_z};
    begin_thread(machine.threads[i], place, machine.stacks.get() + i * kStackBytes);
  }
  do {
    for (const int warp : order_of(launch.threads / kLanes)) run_warp(&machine.threads[warp * kLanes]);
    for (int i = kLanes; i < launch.threads; i += kLanes) {
      if (!together(machine.threads[i], machine.threads[0])) fail_apart(machine.threads[i], machine.threads[0]);
    }
  } while (machine.threads[0].state != State::kDone);
}

void make_room(int threads) {
  if (machine.threads.size() < static_cast<size_t>(threads)) machine.threads.resize(threads);
  if (machine.num_stacks >= static_cast<size_t>(threads)) return;
  void* memory = nullptr;
  if (posix_memalign(&memory, 4096, threads * kStackBytes) != 0) std::abort();
  machine.stacks.reset(static_cast<unsigned char*>(memory));
  machine.num_stacks = threads;
}

}  // namespace

int run(const Launch& launch) {
  const bool possible = launch.threads > 0 && launch.threads <= kMostThreads && launch.shared_bytes >= 0 &&
                        launch.shared_bytes <= most_shared && launch.grid_x > 0 && launch.grid_y > 0 &&
                        launch.grid_z > 0 && launch.grid_x <= kMostBlocks && launch.grid_y <= kMostBlocksAcross &&
                        launch.grid_z <= kMostBlocksAcross;
  if (!possible) return kInvalidValue;
  last_shared = launch.shared_bytes;
  if (launch.threads % kLanes != 0) {
    std::fprintf(stderr, "emulated kernel: a block must be whole warps, got %d threads\n", launch.threads);
    std::abort();
  }
  make_room(launch.threads);
  machine.launch = &launch;
  machine.random.seed(chosen_order);
  for (const int z : order_of(launch.grid_z)) {
    for (const int y : order_of(launch.grid_y)) {
      for (const int x : order_of(launch.grid_x)) run_block(launch, x, y, z);
    }
  }
  machine.running = nullptr;
  return 0;
}

void set_order(int order) { chosen_order = order; }

int shared_bytes() { return most_shared; }

void set_shared_bytes(int bytes) { most_shared = bytes; }

int last_shared_bytes() { return last_shared; }

int answer() { return given_answer; }

void set_answer(int number) { given_answer = number; }

const Place& place() { return machine.running->place; }

unsigned char* shared() { return machine.shared; }

void meet_block(int line) { meet(*machine.running, State::kInBlock, "sync_threads", line); }

void meet_warp(const char* name, int line, void (*work)(void* const*), void* argument) {
  machine.running->work = work;
  machine.running->argument = argument;
  meet(*machine.running, State::kInWarp, name, line);
}

void check_shared(const char* name, const void* address, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(address);
  const Thread& thread = *machine.running;
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) fail(thread, "gives %s an address that is not aligned to 16", name);
  const auto* begin = machine.shared;
  if (at < begin || at + bytes > begin + machine.launch->shared_bytes) {
    fail(thread, "gives %s an address outside shared memory: byte %td of %d", name, at - begin,
         machine.launch->shared_bytes);
  }
}

static void move(const Copy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, copy.bytes);
  } else {
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

void copy_later(void* to, const void* from, size_t bytes) {
  check_shared("cp_async", to, bytes);
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail(*machine.running, "gives cp_async a source that is not aligned to %zu", bytes);
  }
  const Copy copy{to, from, bytes};
  if (chosen_order % 2 == 1) move(copy);
  machine.running->groups.back().push_back(copy);
}

void commit_copies() { machine.running->groups.emplace_back(); }

void wait_copies(size_t newest) {
  auto& groups = machine.running->groups;
  while (groups.size() > newest + 1) {  // the last is not committed
    for (const Copy& copy : groups.front()) {
      if (chosen_order % 2 == 0) move(copy);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace pcl::emulated
