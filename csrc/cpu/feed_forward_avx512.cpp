#include "feed_forward_kernel.h"

namespace pcl {

FeedForwardKernels feed_forward_kernels_avx512() { return feed_forward_kernels_of<Simd<float, 64, 6, 4>>(); }

}  // namespace pcl
