#include "../plan_batches.h"

#include <functional>
#include <queue>
#include <utility>
#include <vector>

namespace pcl {

bool plan_batches_cpu(const int64_t* costs, int64_t count, int64_t capacity, int64_t num_bins, int64_t* bins) {
  using Bin = std::pair<int64_t, int64_t>;  // load, number
  std::vector<Bin> empty(num_bins);
  for (int64_t b = 0; b < num_bins; ++b) empty[b] = {0, b};
  std::priority_queue<Bin, std::vector<Bin>, std::greater<Bin>> emptiest(std::greater<Bin>(), std::move(empty));
  for (int64_t i = 0; i < count; ++i) {
    const auto [load, bin] = emptiest.top();
    if (costs[i] > capacity - load) return false;
    emptiest.pop();
    emptiest.push({load + costs[i], bin});
    bins[i] = bin;
  }
  return true;
}

}  // namespace pcl
