#include "prompt_attention_bf16_bwd_kernel.h"

namespace pcl {

AttentionKernels attention_kernels_avx512bf16() { return bf16_kernels<PairEngine>(); }

}  // namespace pcl
