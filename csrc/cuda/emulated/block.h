// Blocks of threads on the CPU, one after another; each thread is a fiber that runs until it meets others. What a GPU
// would not forgive aborts with a message: a thread that misses a meeting or is elsewhere, copies nobody waits for,
// addresses that are not aligned or not in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pcl::emulated {

// What all threads of a launch share: where they are, and the body they run.
struct Launch {
  unsigned grid_x, grid_y, grid_z;
  int threads, shared_bytes;
  void (*body)(void*);
  void* argument;
};

struct Place {
  unsigned block_x, block_y, block_z;
  int thread, threads;
  unsigned grid_x, grid_y, grid_z;
};

// 0, or cudaErrorInvalidValue where a GPU would refuse the launch.
int run(const Launch& launch);

// In which order blocks, warps and lanes run between two meetings: 0 first to last, 1 last to first, others shuffled
// by that seed. Results that depend on it are races.
void set_order(int order);

// How much shared memory a block may have: sm_80's at first.
int shared_bytes();
void set_shared_bytes(int bytes);

// How much the last launch asked for.
int last_shared_bytes();

// The error number of whatever is asked of the device: 0 at first.
int answer();
void set_answer(int number);

// Of the thread that is running.
const Place& place();
unsigned char* shared();

// Every thread of the block, from the same line.
void meet_block(int line);

// All lanes of a warp, from the same line, with an argument each; then work(arguments), once, before any goes on.
void meet_warp(const char* name, int line, void (*work)(void* const* arguments), void* argument);

// Aborts unless bytes at address lie in shared memory and are aligned to 16.
void check_shared(const char* name, const void* address, size_t bytes);

// Copies happen when they are waited for, in odd orders at once: a GPU may do either. Null source: zeros.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(size_t newest);

inline constexpr int kLanes = 32;
inline constexpr int kMultiprocessors = 3;

}  // namespace pcl::emulated
