// How blocks find the rows of histories: in slots of 16 rows of one history each. Slot begin(b) / 16 + b is the first
// of history b, so that a search over the offsets finds whose a slot is, and the number of slots is known without
// having read them. Some are empty. Tiles begin where histories begin: a history's bits do not depend on its company.
// Offsets and indices are read without having been checked: what is read of them is clamped. Slots are counted in an
// int: 2^31 of them are more than a GPU holds.
#pragma once

#include "attention_tiles.h"
#include "rows.h"

namespace pcl {

// Runs of packed rows cut into slots: histories, or prefixes.
struct Slots {
  Histories runs;

  // The last run ends in the last slot or before; without runs there is none.
  __host__ __device__ int count() const {
    return static_cast<int>((runs.total + kTileRows - 1) / kTileRows + (runs.batch > 0 ? runs.batch - 1 : 0));
  }
  __device__ __forceinline__ int first(int run) const { return static_cast<int>(runs.begin(run) / kTileRows) + run; }
};

// Where a slot's rows are. length 0: it is empty.
struct Slot {
  int64_t begin;                // of its run, in packed rows
  int first, run, length, row;  // slot and number of its run; rows row .. of `length` rows

  __device__ __forceinline__ int count() const { return clamp(length - row, 0, kTileRows); }
  // another slot of the run; empty past its ends
  __device__ __forceinline__ Slot other(int slot) const {
    const int row = (slot - first) * kTileRows;
    const bool inside = row >= 0 && row < length;
    return {begin, first, run, inside ? length : 0, inside ? row : 0};
  }
  // slot of the run, first - 1 when it is empty
  __device__ __forceinline__ int last() const { return first + (length + kTileRows - 1) / kTileRows - 1; }
};

__device__ __forceinline__ Slot slot_of_run(const Slots& slots, int slot, int run) {
  const int64_t begin = slots.runs.begin(run), length = slots.runs.end(run) - begin;
  const int first = slots.first(run);
  const int64_t row = static_cast<int64_t>(slot - first) * kTileRows;
  const bool inside = row >= 0 && row < length;
  return {begin, first, run, inside ? static_cast<int>(length) : 0, inside ? static_cast<int>(row) : 0};
}

// A slot's run is the last that begins at or before it. A warp searches together, and its lane i, up to kCount, finds
// the slot i further on: as many runs at most begin in between, since each takes a slot.
template <int kCount = 1>
__device__ __forceinline__ Slot find_slot_warp(const Slots& slots, int slot) {
  if (slot >= slots.count()) return {};
  int low = 0, high = static_cast<int>(slots.runs.batch);
  while (high - low > 1) {
    const int step = (high - low + kWarp - 1) / kWarp;
    const int probe = low + (lane_index() + 1) * step;
    const unsigned before = ballot(probe < high && slots.first(probe < high ? probe : low) <= slot);
    const int count = count_bits(before);
    low += count * step;
    high = high < low + step ? high : low + step;
  }
  if (high == 0) return {};
  const int batch = static_cast<int>(slots.runs.batch), own = slot + (kCount > 1 ? lane_index() : 0);
  int run = low;
#pragma unroll
  for (int i = 1; i < kCount; ++i) {
    if (low + i < batch && slots.first(low + i) <= own) run = low + i;
  }
  return slot_of_run(slots, own, run);
}

}  // namespace pcl
