// How blocks share the rows of a packed tensor, and whose rows they are. Offsets are read without having been checked:
// what is read of them is clamped, and no index here depends on more.
#pragma once

#include <cstdint>

#include "device.h"

namespace pcl {

inline constexpr int kRowThreads = 256;
inline constexpr int kRowsEach = 4;  // rows a thread has under way at the same time

// Neighbouring lanes, a power of two of them up to a warp, move a row of `units` units together.
struct RowSplit {
  int64_t units;
  int log2_lanes;

  static RowSplit of(int64_t units) {
    int log2_lanes = 0;
    while (log2_lanes < 5 && int64_t{1} << log2_lanes < units) ++log2_lanes;
    return {units, log2_lanes};
  }

  // Rows of a block in one pass, and in all.
  __host__ __device__ int rows_a_pass() const { return kRowThreads >> log2_lanes; }
  __host__ __device__ int rows_a_block() const { return rows_a_pass() * kRowsEach; }
  unsigned blocks(int64_t rows) const { return static_cast<unsigned>((rows + rows_a_block() - 1) / rows_a_block()); }
};

inline constexpr int kMostRowsABlock = kRowThreads * kRowsEach;

// Whether 16 bytes at a time may be read at every row: all addresses and strides are multiples of 16.
template <class... Addresses>
bool aligned16(Addresses... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
}

struct Histories {
  const int64_t* offsets;  // [batch + 1]
  int64_t batch, total;

  __device__ __forceinline__ int64_t begin(int64_t b) const { return clamp<int64_t>(offsets[b], 0, total); }
  __device__ __forceinline__ int64_t end(int64_t b) const { return begin(b + 1); }
};

// The last history that begins at or before row, the first if none does; a warp searches together.
__device__ __forceinline__ int64_t find_history_warp(const Histories& histories, int64_t row) {
  int64_t low = 0, high = histories.batch;
  while (high - low > 1) {
    const int64_t step = (high - low + kWarp - 1) / kWarp;
    const int64_t probe = low + (lane_index() + 1) * step;
    const unsigned before = ballot(probe < high && histories.offsets[probe < high ? probe : low] <= row);
    const int count = count_bits(before);
    low += count * step;
    high = high < low + step ? high : low + step;
  }
  return low;
}

// The same among low..high - 1, by one thread.
__device__ __forceinline__ int64_t find_history(const Histories& histories, int64_t row, int64_t low, int64_t high) {
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (histories.offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls own(row of the block, row, its history, -1 without any) for the rows of this block, one thread each, then
// meets all threads. Needs two numbers in shared memory.
template <class Own>
__device__ __forceinline__ void for_own_rows(const Histories& histories, int rows_a_block, int64_t* first_last,
                                             Own own) {
  const int64_t first = static_cast<int64_t>(block_x()) * rows_a_block;
  const int64_t left = histories.total - first;
  const int rows = static_cast<int>(left < rows_a_block ? left : rows_a_block);
  if (warp_index() < 2) {
    const int64_t found = find_history_warp(histories, warp_index() == 0 ? first : first + rows - 1);
    if (lane_index() == 0) first_last[warp_index()] = found;
  }
  sync_threads();
  const int64_t low = first_last[0], high = first_last[1] + 1;
  for (int i = thread_index(); i < rows; i += kRowThreads) {
    own(i, first + i, histories.batch == 0 ? -1 : find_history(histories, first + i, low, high));
  }
  sync_threads();
}

}  // namespace pcl
