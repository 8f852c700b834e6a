#include "copy_rows.h"
#include "rows.h"
#include "to_packed.h"

namespace pcl {

namespace {

// A block owns rows_a_block packed rows: it finds whose they are, then copies them from where they lie in the padded
// block. A row that is no history's, or past the block's length, is zeros.
template <class Unit>
__global__ void __launch_bounds__(kRowThreads)
    to_packed_kernel(const char* padded, Histories histories, char* packed, PaddedShape shape, RowSplit split) {
  auto* first_last = reinterpret_cast<int64_t*>(shared_memory());
  int64_t* source = first_last + 2;
  for_own_rows(histories, split.rows_a_block(), first_last, [&](int i, int64_t row, int64_t b) {
    const int64_t position = b < 0 ? -1 : row - histories.begin(b);
    const bool inside = position >= 0 && position < shape.max_seqlen;
    source[i] = inside ? b * shape.padded_history_stride + position * shape.padded_row_stride : -1;
  });
  copy_rows<Unit>(split, shape.total, [&](int i, int64_t row) {
    const auto* from = source[i] < 0 ? nullptr : reinterpret_cast<const Unit*>(padded + source[i]);
    return RowCopy<Unit>{from, reinterpret_cast<Unit*>(packed + row * shape.row_bytes)};
  });
}

}  // namespace

int to_packed_cuda(const char* padded, const int64_t* offsets, char* packed, const PaddedShape& shape, void* stream) {
  if (shape.total == 0 || shape.row_bytes == 0) return 0;
  const Histories histories{offsets, shape.batch, shape.total};
  const int64_t together = reinterpret_cast<uintptr_t>(padded) | reinterpret_cast<uintptr_t>(packed) |
                           shape.padded_history_stride | shape.padded_row_stride | shape.row_bytes;
  return with_unit(together, [&](auto unit) {
    using Unit = decltype(unit);
    const RowSplit split = RowSplit::of(shape.row_bytes / static_cast<int64_t>(sizeof(Unit)));
    const int shared_bytes = (2 + split.rows_a_block()) * sizeof(int64_t);
    return launch(to_packed_kernel<Unit>, {split.blocks(shape.total)}, kRowThreads, shared_bytes, stream, padded,
                  histories, packed, shape, split);
  });
}

}  // namespace pcl
