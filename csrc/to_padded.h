// to_padded: packed rows to a padded block. An exact copy of bytes, whatever the dtype.
//
//   packed   [T, ...]      by row stride, contiguous from the second dimension on
//   offsets  [B + 1]       int64; history b owns packed[offsets[b] : offsets[b + 1]]
//   padding  row_bytes     the bytes of one row of padding; null for zeros
//   padded   [B, L, ...]   contiguous
// The caller has checked shapes, dtypes, strides and device and, on the CPU, the offsets by padded_check_cpu.
#pragma once

#include "to_packed.h"

namespace pcl {

void to_padded_cpu(const char* packed, const int64_t* offsets, const char* padding, char* padded,
                   const PaddedShape& shape, int threads);

// On the device, on a stream; an error number of CUDA's, 0 for none. Offsets are clamped to 0..T where they are read.
int to_padded_cuda(const char* packed, const int64_t* offsets, const char* padding, char* padded,
                   const PaddedShape& shape, void* stream);

}  // namespace pcl
