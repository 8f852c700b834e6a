// to_packed: a padded block to packed rows. An exact copy of bytes, whatever the dtype.
//
//   padded   [B, L, ...]   by history and row stride, contiguous from the third dimension on
//   offsets  [B + 1]       int64; history b owns packed[offsets[b] : offsets[b + 1]]
//   packed   [T, ...]      contiguous
// Offsets are checked here on the CPU; shapes, dtypes, strides and device by the caller.
#pragma once

#include <cstdint>

namespace pcl {

struct PaddedShape {
  int64_t batch, max_seqlen, total;
  int64_t row_bytes, packed_stride, padded_row_stride, padded_history_stride;  // strides in bytes
};

// Whether offsets run from 0 to total without falling and no history is longer than max_seqlen.
bool padded_check_cpu(const int64_t* offsets, const PaddedShape& shape);

void to_packed_cpu(const char* padded, const int64_t* offsets, char* packed, const PaddedShape& shape, int threads);

// On the device, on a stream; an error number of CUDA's, 0 for none. Offsets are clamped to 0..T where they are read; a
// packed row whose place they put outside the padded block is zeros.
int to_packed_cuda(const char* padded, const int64_t* offsets, char* packed, const PaddedShape& shape, void* stream);

}  // namespace pcl
