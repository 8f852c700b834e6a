#include "bf16_weights.h"
#include "linear_kernel.h"

namespace pcl {

LinearKernels linear_kernels_avx512bf16() { return linear_kernels_of<Wide, PairWeights<PairEngine>>(); }

}  // namespace pcl
