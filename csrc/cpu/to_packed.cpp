#include "../to_packed.h"

#include <cstring>

#include "../parallel.h"

namespace pcl {

bool padded_check_cpu(const int64_t* offsets, const PaddedShape& shape) {
  if (offsets[0] != 0 || offsets[shape.batch] != shape.total) return false;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t begin = offsets[b], end = offsets[b + 1];
    if (end < begin || end - begin > shape.max_seqlen) return false;
  }
  return true;
}

void to_packed_cpu(const char* padded, const int64_t* offsets, char* packed, const PaddedShape& shape, int threads) {
  parallel_for_shares(shape.batch, threads_for_bytes(shape.total * shape.row_bytes, threads), [&](int64_t b) {
    const char* from = padded + b * shape.padded_history_stride;
    char* to = packed + offsets[b] * shape.row_bytes;
    const int64_t length = offsets[b + 1] - offsets[b];
    if (length == 0 || shape.row_bytes == 0) return;
    if (shape.padded_row_stride == shape.row_bytes) {
      std::memcpy(to, from, length * shape.row_bytes);
      return;
    }
    for (int64_t i = 0; i < length; ++i)
      std::memcpy(to + i * shape.row_bytes, from + i * shape.padded_row_stride, shape.row_bytes);
  });
}

}  // namespace pcl
