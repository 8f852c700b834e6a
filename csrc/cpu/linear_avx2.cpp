#include "linear_kernel.h"

namespace pcl {

LinearKernels linear_kernels_avx2() { return linear_kernels_of<Simd<float, 32, 4, 3>>(); }

}  // namespace pcl
