// linear: the work of one block of rows, once per instruction set. See ../linear.h for what is computed.
#pragma once

#include "linear_tasks.h"
#include "row_block.h"

namespace pcl {
namespace {

template <class S>
void add_bias(const void* bias, int64_t first, int64_t features, int64_t rows, typename S::A* block) {
  if (!bias) return;
  for (int64_t f = 0; f < features; ++f) {
    const auto each = S::fill(static_cast<const typename S::A*>(bias)[first + f]);
    typename S::A* to = block + f * kBlockRows<S>;
    for (int64_t r = 0; r < rows; r += S::kLanes) S::store(to + r, S::load(to + r) + each);
  }
}

template <class S, class Weights>
void linear_fwd_block(const LinearArgs& args, void* out, Scalar out_dtype, Block block, void* scratch) {
  using A = typename S::A;
  Pieces<A> pieces{static_cast<A*>(scratch)};
  const int64_t wide = S::round_up(args.in_dim);
  A *x = pieces.take(wide * kBlockRows<S>), *normed = pieces.take(wide * kBlockRows<S>);
  A *some = pieces.take(kFeatureStep * kBlockRows<S>), *staging = pieces.take(S::kLanes * wide);
  auto* prepared = reinterpret_cast<typename Weights::Operand*>(pieces.take(wide * kBlockRows<S>));
  [[maybe_unused]] const typename Weights::Session session;
  const Target target{out, args.out_dim, out_dtype, args.residual};
  const int64_t first = block.first, rows = block.rows;
  RowMoments<S> moments;
  load_block<S>(args.x, first, rows, args.in_dim, x, staging);
  const A* ready = normalise<S>(x, args.norm, rows, args.in_dim, moments, normed);
  const auto* block_of_x = Weights::prepare(ready, args.in_dim, rows, prepared);
  for (int64_t f = 0; f < args.out_dim; f += kFeatureStep) {
    const int64_t features = args.out_dim - f < kFeatureStep ? args.out_dim - f : kFeatureStep;
    Weights::multiply(args.weight, f, features, 0, args.in_dim, block_of_x, rows, false, some);
    add_bias<S>(args.bias, f, features, rows, some);
    store_block<S>(some, target, first, rows, f, features);
  }
}

template <class S, class Weights>
void linear_bwd_block(const LinearArgs& args, const Matrix& grad_out, void* grad_x, Block block, void* scratch) {
  using A = typename S::A;
  Pieces<A> pieces{static_cast<A*>(scratch)};
  const int64_t wide = S::round_up(args.in_dim), wide_out = S::round_up(args.out_dim);
  A *x = pieces.take(wide * kBlockRows<S>), *grad = pieces.take(wide * kBlockRows<S>);
  A *grad_rows = pieces.take(wide_out * kBlockRows<S>), *staging = pieces.take(S::kLanes * (wide + wide_out));
  auto* prepared = reinterpret_cast<typename Weights::Operand*>(pieces.take(wide_out * kBlockRows<S>));
  [[maybe_unused]] const typename Weights::Session session;
  const Target target{grad_x, args.in_dim, args.x.dtype, {}};
  const int64_t first = block.first, rows = block.rows;
  RowMoments<S> moments;
  if (args.norm.weight) {
    load_block<S>(args.x, first, rows, args.in_dim, x, staging);
    normalise<S>(x, args.norm, rows, args.in_dim, moments, grad);  // for its moments; grad is written below
  }
  load_block<S>(grad_out, first, rows, args.out_dim, grad_rows, staging);
  const auto* block_of_grad = Weights::prepare(grad_rows, args.out_dim, rows, prepared);
  Weights::multiply(args.weight, 0, args.in_dim, 0, args.out_dim, block_of_grad, rows, false, grad);
  normalise_bwd<S>(x, args.norm, rows, args.in_dim, moments, grad);
  store_block<S>(grad, target, first, rows, 0, args.in_dim);
}

template <class S, class Weights = PlainWeights<S>>
LinearKernels linear_kernels_of() {
  return {linear_fwd_block<S, Weights>, linear_bwd_block<S, Weights>, kBlockRows<S>};
}

}  // namespace
}  // namespace pcl
