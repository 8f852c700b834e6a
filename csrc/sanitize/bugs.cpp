#include "bugs.h"

namespace pcl {

float read_past_the_end(const float* values, int64_t count) { return values[count]; }

int overflow_an_int(int value) { return value + 1; }

}  // namespace pcl
