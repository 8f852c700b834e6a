#include "linear_kernel.h"

namespace pcl {

LinearKernels linear_kernels_avx512() { return linear_kernels_of<Simd<float, 64, 6, 4>>(); }

}  // namespace pcl
