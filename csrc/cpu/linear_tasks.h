// What one instruction set's copy of linear offers: the work of one block of rows. The driver shares blocks out.
#pragma once

#include "../linear.h"

namespace pcl {

struct LinearKernels {
  void (*fwd)(const LinearArgs& args, void* out, Scalar out_dtype, int64_t block, void* scratch);
  void (*bwd)(const LinearArgs& args, const Matrix& grad_out, void* grad_x, int64_t block, void* scratch);
  int64_t block_rows;
};

// wide: double, else float
LinearKernels linear_kernels_baseline(bool wide);
LinearKernels linear_kernels_avx2();
LinearKernels linear_kernels_avx512();

// For bfloat16 weights whose dimensions are multiples of 32.
LinearKernels linear_kernels_avx512bf16();
LinearKernels linear_kernels_amx();
LinearKernels linear_kernels_emulated_tiles();

// Elements of scratch for a block.
constexpr int64_t linear_scratch(int64_t in_dim, int64_t out_dim) {
  return (3 * in_dim + 2 * out_dim + 192) * 64 + 16 * (in_dim + out_dim + 32);
}

}  // namespace pcl
