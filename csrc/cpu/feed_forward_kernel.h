// feed_forward: the work of one block of rows, once per instruction set. See ../feed_forward.h for what is computed.
//
// The hidden features are taken kFeatureStep at a time: made, used and forgotten while they lie in the first cache.
#pragma once

#include "feed_forward_tasks.h"
#include "row_block.h"

namespace pcl {
namespace {

// exp(-u^2 / 2), the bell of the normal distribution, and Phi(u), the share of it below u.
template <class S>
struct Normal {
  typename S::V bell, below;
};

// Single precision: Phi(u) - 1/2 = u P(u^2) near 0, Phi(-|u|) = bell Q(|u|) elsewhere, both fitted to 1e-8.
template <class S>
inline Normal<S> normal(typename S::V u) {
  using A = typename S::A;
  using V = typename S::V;
  const V t = u * u, bell = exp_v<S>(t * static_cast<A>(-0.5));
  V below;
  if constexpr (sizeof(A) == 8) {
    for (int i = 0; i < S::kLanes; ++i) below[i] = 0.5 * __builtin_erfc(u[i] * -0.70710678118654752440);
  } else {
    const V zero{}, edge = S::fill(1.4f), most = S::fill(5.6f);  // from there on bell is below rounding
    const V size = u < zero ? -u : u, v = size > most ? most : size;
    V p = S::fill(-6.1075007e-6f);
    p = p * t + 1.0799649e-4f;
    p = p * t - 1.1790735e-3f;
    p = p * t + 9.969063e-3f;
    p = p * t - 6.648934e-2f;
    p = p * t + 3.989422e-1f;
    V q = S::fill(-1.7562983e-5f);
    q = q * v + 3.8201854e-4f;
    q = q * v - 3.6737253e-3f;
    q = q * v + 2.0719381e-2f;
    q = q * v - 7.67939e-2f;
    q = q * v + 1.988253e-1f;
    q = q * v - 3.7111455e-1f;
    q = q * v + 4.9322915e-1f;
    const V tail = bell * q;
    below = u < zero ? tail : 1.0f - tail;
    below = size < edge ? 0.5f + u * p : below;
  }
  return {bell, below};
}

template <class S>
inline typename S::V gelu(typename S::V u) {
  return u * normal<S>(u).below;
}

// gelu'(u) = Phi(u) + u bell / sqrt(2 pi)
template <class S>
inline typename S::V gelu_slope(typename S::V u) {
  const Normal<S> at = normal<S>(u);
  return at.below + static_cast<typename S::A>(0.39894228040143267794) * u * at.bell;
}

// Calls each(f, features) for the hidden features, kFeatureStep at a time.
template <class Each>
void for_features(int64_t hidden, Each each) {
  for (int64_t f = 0; f < hidden; f += kFeatureStep) each(f, hidden - f < kFeatureStep ? hidden - f : kFeatureStep);
}

template <class S, class Weights>
void feed_forward_fwd_block(const FeedForwardArgs& args, void* out, Block block, void* scratch) {
  using A = typename S::A;
  Pieces<A> pieces{static_cast<A*>(scratch)};
  const int64_t wide = S::round_up(args.dim);
  A *x = pieces.take(wide * kBlockRows<S>), *normed = pieces.take(wide * kBlockRows<S>);
  A *hidden = pieces.take(kFeatureStep * kBlockRows<S>), *staging = pieces.take(S::kLanes * wide);
  const auto operand = [&](int64_t features) {
    return reinterpret_cast<typename Weights::Operand*>(pieces.take(features * kBlockRows<S>));
  };
  auto *prepared_x = operand(wide), *prepared_hidden = operand(kFeatureStep);
  [[maybe_unused]] const typename Weights::Session session;
  const A *bias_in = static_cast<const A*>(args.bias_in), *bias_out = static_cast<const A*>(args.bias_out);
  const int64_t first = block.first, rows = block.rows;
  RowMoments<S> moments;
  load_block<S>(args.x, first, rows, args.dim, x, staging);
  normalise<S>(x, args.norm, rows, args.dim, moments, normed);
  const auto* block_of_x = Weights::prepare(normed, args.dim, rows, prepared_x);
  for (int64_t f = 0; f < args.dim; ++f) {
    A* to = x + f * kBlockRows<S>;
    for (int64_t r = 0; r < rows; r += S::kLanes) S::store(to + r, S::load(to + r) + bias_out[f]);
  }
  for_features(args.hidden, [&](int64_t f, int64_t features) {
    Weights::multiply(args.weight_in, f, features, 0, args.dim, block_of_x, rows, false, hidden);
    for (int64_t i = 0; i < features; ++i) {
      A* to = hidden + i * kBlockRows<S>;
      for (int64_t r = 0; r < rows; r += S::kLanes) {
        const auto u = S::load(to + r) + bias_in[f + i];
        S::store(to + r, gelu<S>(u));
      }
    }
    const auto* block_of_hidden = Weights::prepare(hidden, features, rows, prepared_hidden);
    Weights::multiply(args.weight_out, 0, args.dim, f, features, block_of_hidden, rows, true, x);
  });
  store_block<S>(x, {out, args.dim, args.x.dtype, {}}, first, rows, 0, args.dim);
}

template <class S, class Weights>
void feed_forward_bwd_block(const FeedForwardArgs& args, const Matrix& grad_out, void* grad_x, Block block,
                            void* scratch) {
  using A = typename S::A;
  Pieces<A> pieces{static_cast<A*>(scratch)};
  const int64_t wide = S::round_up(args.dim);
  const auto piece = [&](int64_t features) { return pieces.take(features * kBlockRows<S>); };
  A *x = piece(wide), *normed = piece(wide), *grad_rows = piece(wide), *grad = piece(wide);
  A *hidden = piece(kFeatureStep), *grad_hidden = piece(kFeatureStep), *staging = pieces.take(S::kLanes * wide);
  const auto operand = [&](int64_t features) { return reinterpret_cast<typename Weights::Operand*>(piece(features)); };
  auto *prepared_x = operand(wide), *prepared_grad = operand(wide), *prepared_hidden = operand(kFeatureStep);
  [[maybe_unused]] const typename Weights::Session session;
  const A* bias_in = static_cast<const A*>(args.bias_in);
  const int64_t first = block.first, rows = block.rows;
  RowMoments<S> moments;
  load_block<S>(args.x, first, rows, args.dim, x, staging);
  normalise<S>(x, args.norm, rows, args.dim, moments, normed);
  load_block<S>(grad_out, first, rows, args.dim, grad_rows, staging);
  const auto* block_of_x = Weights::prepare(normed, args.dim, rows, prepared_x);
  const auto* block_of_grad = Weights::prepare(grad_rows, args.dim, rows, prepared_grad);
  for_features(args.hidden, [&](int64_t f, int64_t features) {
    Weights::multiply(args.weight_in, f, features, 0, args.dim, block_of_x, rows, false, hidden);
    Weights::multiply(args.weight_out, f, features, 0, args.dim, block_of_grad, rows, false, grad_hidden);
    for (int64_t i = 0; i < features; ++i) {
      const A* u = hidden + i * kBlockRows<S>;
      A* to = grad_hidden + i * kBlockRows<S>;
      for (int64_t r = 0; r < rows; r += S::kLanes) {
        S::store(to + r, S::load(to + r) * gelu_slope<S>(S::load(u + r) + bias_in[f + i]));
      }
    }
    const auto* block_of_hidden = Weights::prepare(grad_hidden, features, rows, prepared_hidden);
    Weights::multiply(args.weight_in_t, 0, args.dim, f, features, block_of_hidden, rows, f > 0, grad);
  });
  for (int64_t i = 0; args.hidden == 0 && i < args.dim * kBlockRows<S>; ++i) grad[i] = A(0);
  normalise_bwd<S>(x, args.norm, rows, args.dim, moments, grad);
  store_block<S>(grad, {grad_x, args.dim, args.x.dtype, grad_out}, first, rows, 0, args.dim);
}

template <class S, class Weights = PlainWeights<S>>
FeedForwardKernels feed_forward_kernels_of() {
  return {feed_forward_fwd_block<S, Weights>, feed_forward_bwd_block<S, Weights>, kBlockRows<S>};
}

}  // namespace
}  // namespace pcl
