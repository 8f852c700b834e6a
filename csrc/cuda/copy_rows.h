// Rows copied bit by bit, in the widest units that all their addresses allow.
#pragma once

#include <cstdint>

#include "rows.h"

namespace pcl {

// Calls run(Unit{}) with the widest unit that divides every number whose bits are in `together`.
template <class Run>
int with_unit(int64_t together, Run run) {
  if (together % 16 == 0) return run(Vec16{});
  if (together % 8 == 0) return run(uint64_t{});
  if (together % 4 == 0) return run(uint32_t{});
  if (together % 2 == 0) return run(uint16_t{});
  return run(uint8_t{});
}

// Null source: zeros.
template <class Unit>
struct RowCopy {
  const Unit* from;
  Unit* to;
};

// Copies this block's rows, of `rows` in all; row_copy(row of the block, row) says from where to where.
template <class Unit, class Copy>
__device__ __forceinline__ void copy_rows(const RowSplit& split, int64_t rows, Copy row_copy) {
  const int lane = thread_index() & ((1 << split.log2_lanes) - 1);
  const int first = thread_index() >> split.log2_lanes;
  const int64_t block_row = static_cast<int64_t>(block_x()) * split.rows_a_block();
  RowCopy<Unit> copies[kRowsEach];
#pragma unroll
  for (int j = 0; j < kRowsEach; ++j) {
    const int i = first + j * split.rows_a_pass();
    copies[j] = block_row + i < rows ? row_copy(i, block_row + i) : RowCopy<Unit>{nullptr, nullptr};
  }
  for (int64_t u = lane; u < split.units; u += 1 << split.log2_lanes) {
    Unit moving[kRowsEach] = {};
#pragma unroll
    for (int j = 0; j < kRowsEach; ++j) {
      if (copies[j].from != nullptr) moving[j] = load_once(copies[j].from + u);
    }
#pragma unroll
    for (int j = 0; j < kRowsEach; ++j) {
      if (copies[j].to != nullptr) store_once(copies[j].to + u, moving[j]);
    }
  }
}

}  // namespace pcl
