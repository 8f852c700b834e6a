#include "../to_padded.h"

#include <cstring>

#include "../parallel.h"

namespace pcl {

void to_padded_cpu(const char* packed, const int64_t* offsets, const char* padding, char* padded,
                   const PaddedShape& shape, int threads) {
  const int64_t row_bytes = shape.row_bytes;
  if (row_bytes == 0 || shape.max_seqlen == 0) return;
  threads = threads_for_bytes(shape.batch * shape.max_seqlen * row_bytes, threads);
  parallel_for_shares(shape.batch, threads, [&](int64_t b) {
    const char* from = packed + offsets[b] * shape.packed_stride;
    char* to = padded + b * shape.max_seqlen * row_bytes;
    const int64_t length = offsets[b + 1] - offsets[b];
    if (shape.packed_stride == row_bytes) {
      if (length) std::memcpy(to, from, length * row_bytes);
    } else {
      for (int64_t i = 0; i < length; ++i) std::memcpy(to + i * row_bytes, from + i * shape.packed_stride, row_bytes);
    }
    to += length * row_bytes;
    if (!padding) {
      std::memset(to, 0, (shape.max_seqlen - length) * row_bytes);
      return;
    }
    for (int64_t i = length; i < shape.max_seqlen; ++i, to += row_bytes) std::memcpy(to, padding, row_bytes);
  });
}

}  // namespace pcl
