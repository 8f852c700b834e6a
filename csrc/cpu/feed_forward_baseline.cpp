#include "feed_forward_kernel.h"

namespace pcl {

FeedForwardKernels feed_forward_kernels_baseline(bool wide) {
  return wide ? feed_forward_kernels_of<Simd<double, 16, 4, 2>>() : feed_forward_kernels_of<Simd<float, 16, 4, 3>>();
}

}  // namespace pcl
