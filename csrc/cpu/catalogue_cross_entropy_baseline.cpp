#include "catalogue_cross_entropy_kernel.h"

namespace pcl {

CatalogueKernels catalogue_kernels_baseline() { return catalogue_kernels_of<Simd<float, 16, 4, 3>>(); }

}  // namespace pcl
