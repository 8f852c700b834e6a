// Small kernels that show what the emulation does: a matrix product by the warp's instructions, and mistakes that it
// must notice, or it watches nothing.
#pragma once

#include "isa.h"

namespace pcl::emulated {

// c [16, 8] float = a [16, 16] b, two-byte numbers; b [16, 8] when transposed, else its columns as rows [8, 16].
int product(const void* a, const void* b, float* c, Scalar dtype, bool transposed, bool wait);

enum class Mistake : int {
  kOneWarpAtABarrier = 0,
  kLanesApart = 1,
  kEarlyEnd = 2,
  kCopyNotWaitedFor = 3,
  kCopyPastTheEnd = 4,
  kCopyNotAligned = 5,
  kWritePastTheEnd = 6,  // AddressSanitizer's to notice
  kPartOfAWarp = 7,
};

// source: 64 bytes.
int make_mistake(Mistake which, const void* source);

// out [64]: what thread 63 - i wrote to shared memory, read without a barrier in between: a race, whose result depends
// on the order.
int race(int* out);

}  // namespace pcl::emulated
