#include "catalogue_cross_entropy_kernel.h"

namespace pcl {

CatalogueKernels catalogue_kernels_avx512() { return catalogue_kernels_of<Simd<float, 64, 6, 4>>(); }

}  // namespace pcl
