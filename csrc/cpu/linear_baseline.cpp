#include "linear_kernel.h"

namespace pcl {

LinearKernels linear_kernels_baseline(bool wide) {
  return wide ? linear_kernels_of<Simd<double, 16, 4, 2>>() : linear_kernels_of<Simd<float, 16, 4, 3>>();
}

}  // namespace pcl
