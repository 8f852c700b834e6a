// What one instruction set's copy of linear offers: the work of a block of rows, which the driver shares out.
#pragma once

#include "../linear.h"

namespace pcl {

struct Block {
  int64_t first, rows;
};

constexpr int64_t kRowStep = 16;  // blocks begin at a multiple of it: whole vectors of rows

struct LinearKernels {
  void (*fwd)(const LinearArgs& args, void* out, Scalar out_dtype, Block block, void* scratch);
  void (*bwd)(const LinearArgs& args, const Matrix& grad_out, void* grad_x, Block block, void* scratch);
  int64_t block_rows;  // at most
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
