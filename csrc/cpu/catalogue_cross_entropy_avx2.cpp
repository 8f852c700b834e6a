#include "catalogue_cross_entropy_kernel.h"

namespace pcl {

CatalogueKernels catalogue_kernels_avx2() { return catalogue_kernels_of<Simd<float, 32, 4, 3>>(); }

}  // namespace pcl
