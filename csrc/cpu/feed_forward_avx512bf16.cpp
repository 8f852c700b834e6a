#include "bf16_weights.h"
#include "feed_forward_kernel.h"

namespace pcl {

FeedForwardKernels feed_forward_kernels_avx512bf16() {
  return feed_forward_kernels_of<Wide, PairWeights<PairEngine>>();
}

}  // namespace pcl
