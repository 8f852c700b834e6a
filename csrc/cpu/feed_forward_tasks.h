// What one instruction set's copy of feed_forward offers: the work of a block of rows, which the driver shares out.
#pragma once

#include "../feed_forward.h"
#include "linear_tasks.h"

namespace pcl {

struct FeedForwardKernels {
  void (*fwd)(const FeedForwardArgs& args, void* out, Block block, void* scratch);
  void (*bwd)(const FeedForwardArgs& args, const Matrix& grad_out, void* grad_x, Block block, void* scratch);
  int64_t block_rows;  // at most
};

// wide: double, else float
FeedForwardKernels feed_forward_kernels_baseline(bool wide);
FeedForwardKernels feed_forward_kernels_avx2();
FeedForwardKernels feed_forward_kernels_avx512();

// For bfloat16 weights whose dimensions are multiples of 32.
FeedForwardKernels feed_forward_kernels_avx512bf16();
FeedForwardKernels feed_forward_kernels_amx();
FeedForwardKernels feed_forward_kernels_emulated_tiles();

// Elements of scratch for a block.
constexpr int64_t feed_forward_scratch(int64_t dim) { return (6 * dim + 400) * 64 + 16 * (dim + 32); }

}  // namespace pcl
