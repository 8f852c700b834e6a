// feed_forward: x + gelu(norm(x) weight_in^T + bias_in) weight_out^T + bias_out, the hidden rows never leaving the
// cache.
//
//   x           [T, D]   by row stride
//   norm        [D]      weight and bias of a layer norm of each row of x
//   weight_in   [F, D]   by row stride; bias_in  [F]
//   weight_out  [D, F]   by row stride; bias_out [D]
//   out         [T, D]   contiguous, of x's dtype
// gelu(u) = u/2 (1 + erf(u / sqrt 2)). Backward, for frozen weights: grad_x of grad_out. It reads weight_in, and
// weight_in_t [D, F] and weight_out_t [F, D] transposed.
// The weights' dtypes, sums, bits and who checks: as linear.h says.
#pragma once

#include <cstdint>

#include "linear.h"

namespace pcl {

struct FeedForwardArgs {
  Matrix x, weight_in, weight_out;  // backward: weight_out is weight_out_t
  Matrix weight_in_t;               // backward only
  LayerNorm norm;
  const void *bias_in, *bias_out;
  int64_t rows, dim, hidden;
};

void feed_forward_fwd_cpu(const FeedForwardArgs& args, void* out, Isa isa, int threads);

// grad_out [T, D] by row stride; grad_x [T, D] contiguous, of x's dtype.
void feed_forward_bwd_cpu(const FeedForwardArgs& args, const Matrix& grad_out, void* grad_x, Isa isa, int threads);

}  // namespace pcl
