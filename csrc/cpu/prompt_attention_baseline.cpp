#include "prompt_attention_bwd_kernel.h"

namespace pcl {

AttentionKernels attention_kernels_baseline(Scalar dtype) {
  using Float = Simd<float, 16, 4, 3>;
  switch (dtype) {
    case Scalar::kDouble:
      return kernels_of<Simd<double, 16, 4, 2>, double>();
    case Scalar::kBfloat16:
      return kernels_of<Float, Bfloat16>();
    default:
      return kernels_of<Float, float>();
  }
}

}  // namespace pcl
