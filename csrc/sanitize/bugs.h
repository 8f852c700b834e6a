// Deliberate bugs, compiled only where PCL_SANITIZE is on: what the sanitizers must report, or they watch nothing.
#pragma once

#include <cstdint>

namespace pcl {

// Reads values[count] of a heap block of count values that somebody else has allocated.
float read_past_the_end(const float* values, int64_t count);

// value + 1, which the largest int has not.
int overflow_an_int(int value);

}  // namespace pcl
