// linear: rows times a weight matrix, normalised before and added to others after, in one pass over memory.
//
//   x            [T, D]   by row stride
//   norm_weight, norm_bias [D]  of a layer norm of each row of x; null for none (both or neither)
//   weight       [N, D]   by row stride; float32 and float64 as x is, or bfloat16 for bfloat16 products (D even then)
//   bias         [N]      null for none
//   residual     [T, N]   by row stride; null for none
//   out          [T, N]   contiguous: residual + norm(x) weight^T + bias
// Backward, for frozen weights: grad_x of grad_out (grad_residual is grad_out itself). It reads weight_t [D, N], the
// transposed weight, in the place of weight.
// norm_weight, norm_bias and bias are float, double for double rows. Products are summed in the same. A row of the
// result is computed from that row alone by steps that do not depend on where it stands: the same bits in any company
// and for any number of threads. The caller has checked shapes, dtypes, strides and device.
#pragma once

#include <cstdint>

#include "isa.h"

namespace pcl {

struct Matrix {
  const void* data;
  int64_t stride;  // of a row, in elements
  Scalar dtype;
};

struct LayerNorm {
  const void *weight, *bias;  // null for none
  double eps;
};

struct LinearArgs {
  Matrix x, weight, residual;  // residual.data is null for none; backward: weight is weight_t
  LayerNorm norm;
  const void* bias;
  int64_t rows, in_dim, out_dim;
};

void linear_fwd_cpu(const LinearArgs& args, void* out, Scalar out_dtype, Isa isa, int threads);

// grad_out [T, N] by row stride; grad_x [T, D] contiguous, of x's dtype.
void linear_bwd_cpu(const LinearArgs& args, const Matrix& grad_out, void* grad_x, Isa isa, int threads);

}  // namespace pcl
