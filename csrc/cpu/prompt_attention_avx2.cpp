#include "prompt_attention_bwd_kernel.h"

namespace pcl {

AttentionKernels attention_kernels_avx2(Scalar dtype) {
  using Float = Simd<float, 32, 4, 3>;
  return dtype == Scalar::kBfloat16 ? kernels_of<Float, Bfloat16>() : kernels_of<Float, float>();
}

}  // namespace pcl
