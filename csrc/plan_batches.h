// plan_batches: rows, in the order given, go to the emptiest bin (of equals, the one with the lowest number).
//
//   costs  [n]   int64, at least 1
//   bins   [n]   int64, the bin of each row
#pragma once

#include <cstdint>

namespace pcl {

// False when a row does not fit into the emptiest bin.
bool plan_batches_cpu(const int64_t* costs, int64_t count, int64_t capacity, int64_t num_bins, int64_t* bins);

}  // namespace pcl
