#include "feed_forward_kernel.h"

namespace pcl {

FeedForwardKernels feed_forward_kernels_avx2() { return feed_forward_kernels_of<Simd<float, 32, 4, 3>>(); }

}  // namespace pcl
