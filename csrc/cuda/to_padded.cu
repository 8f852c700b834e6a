#include "copy_rows.h"
#include "to_padded.h"

namespace pcl {

namespace {

// A block owns rows_a_block rows of the padded block, histories back to back.
template <class Unit>
__global__ void __launch_bounds__(kRowThreads)
    to_padded_kernel(const char* packed, Histories histories, const char* padding, char* padded, PaddedShape shape,
                     RowSplit split) {
  // One long division a thread; from there on numbers are small.
  const int64_t block_row = static_cast<int64_t>(block_x()) * split.rows_a_block();
  const int64_t first = block_row / shape.max_seqlen, ahead = block_row - first * shape.max_seqlen;
  copy_rows<Unit>(split, shape.batch * shape.max_seqlen, [&](int i, int64_t row) {
    const int64_t place = ahead + i;
    const int64_t further = shape.max_seqlen < kMostRowsABlock
                                ? static_cast<unsigned>(place) / static_cast<unsigned>(shape.max_seqlen)
                                : place >= shape.max_seqlen;
    const int64_t b = first + further, position = place - further * shape.max_seqlen;
    const int64_t source = histories.begin(b) + position;
    const char* from = source < histories.end(b) ? packed + source * shape.packed_stride : padding;
    return RowCopy<Unit>{reinterpret_cast<const Unit*>(from), reinterpret_cast<Unit*>(padded + row * shape.row_bytes)};
  });
}

}  // namespace

int to_padded_cuda(const char* packed, const int64_t* offsets, const char* padding, char* padded,
                   const PaddedShape& shape, void* stream) {
  const int64_t rows = shape.batch * shape.max_seqlen;
  if (rows == 0 || shape.row_bytes == 0) return 0;
  const Histories histories{offsets, shape.batch, shape.total};
  const int64_t together = reinterpret_cast<uintptr_t>(packed) | reinterpret_cast<uintptr_t>(padding) |
                           reinterpret_cast<uintptr_t>(padded) | shape.packed_stride | shape.row_bytes;
  return with_unit(together, [&](auto unit) {
    using Unit = decltype(unit);
    const RowSplit split = RowSplit::of(shape.row_bytes / static_cast<int64_t>(sizeof(Unit)));
    return launch(to_padded_kernel<Unit>, {split.blocks(rows)}, kRowThreads, 0, stream, packed, histories, padding,
                  padded, shape, split);
  });
}

}  // namespace pcl
