// Blocks of rows, feature by feature: what linear and feed_forward are made of, once per instruction set.
//
// A block holds up to kBlockRows rows as [features][kBlockRows]: column r is row r. In this layout weights are read
// where they lie, one number against a vector of rows, a norm is a few sums down the columns, and every lane computes a
// row of its own.
#pragma once

#include "../linear.h"
#include "few_rows.h"
#include "simd.h"
#include "transpose.h"

namespace pcl {
namespace {

// As many rows as whole register tiles of a product hold, at most 64.
template <class S>
constexpr int64_t kBlockRows = 64 / (S::kLanes * S::kTileVecs) * (S::kLanes * S::kTileVecs);

constexpr int64_t kFeatureStep = 96;  // features taken at a time, a multiple of every tile's rows and every vector

template <class S, class T>
void load_rows(const T* from, int64_t stride, int64_t rows, int64_t dim, typename S::A* to, typename S::A* staging) {
  for (int64_t i = 0; i < rows; i += S::kLanes) {
    const int64_t count = rows - i < S::kLanes ? rows - i : S::kLanes;
    const Rows<typename S::A> some = as_rows<S>(from + i * stride, stride, count, dim, staging);
    for (int64_t c = 0; c < dim; c += S::kLanes) {
      transpose_square<S>(some.data + c, some.stride, count, to + c * kBlockRows<S> + i, kBlockRows<S>);
    }
  }
}

// Rows first .. first + rows - 1 of a matrix [., dim] as a block; `to` has room for dim rounded up to whole vectors.
template <class S>
void load_block(const Matrix& from, int64_t first, int64_t rows, int64_t dim, typename S::A* to,
                typename S::A* staging) {
  const int64_t at = first * from.stride;
  if (from.dtype == Scalar::kBfloat16) {
    return load_rows<S>(static_cast<const Bfloat16*>(from.data) + at, from.stride, rows, dim, to, staging);
  }
  load_rows<S>(static_cast<const typename S::A*>(from.data) + at, from.stride, rows, dim, to, staging);
}

// A row's `count` features, at most a vector: to = from (+ residual).
template <class S, class T>
inline void store_vector(const typename S::A* from, const T* residual, int64_t count, T* to) {
  if constexpr (sizeof(T) == sizeof(typename S::A)) {
    if (count == S::kLanes) {
      return S::store(to, residual ? S::load(from) + S::load(residual) : S::load(from));
    }
  }
  for (int64_t i = 0; i < count; ++i) narrow(residual ? from[i] + widen(residual[i]) : from[i], to + i);
}

template <class S, class T>
void store_rows(const typename S::A* from, int64_t rows, int64_t features, const T* residual, int64_t residual_row,
                T* to, int64_t to_row) {
  constexpr int W = S::kLanes;
  alignas(64) typename S::A square[W * W];
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t f = 0; f < features; f += W) {
      const int64_t wanted = features - f < W ? features - f : W;
      transpose_square<S>(from + f * kBlockRows<S> + i, kBlockRows<S>, wanted, square, W);
      for (int64_t r = 0; r < W && i + r < rows; ++r) {
        const T* more = residual ? residual + (i + r) * residual_row + f : nullptr;
        store_vector<S>(square + r * W, more, wanted, to + (i + r) * to_row + f);
      }
    }
  }
}

// Where a block's features go: row `first` on, column `column` on of a matrix, with those of residual added.
struct Target {
  void* data;
  int64_t stride;
  Scalar dtype;
  Matrix residual;
};

template <class S>
void store_block(const typename S::A* from, const Target& target, int64_t first, int64_t rows, int64_t column,
                 int64_t features) {
  const int64_t at = first * target.stride + column, more = first * target.residual.stride + column;
  const auto store = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const T* residual = static_cast<const T*>(target.residual.data);
    store_rows<S>(from, rows, features, residual ? residual + more : nullptr, target.residual.stride, to + at,
                  target.stride);
  };
  if (target.dtype == Scalar::kBfloat16) return store(static_cast<Bfloat16*>(target.data));
  store(static_cast<typename S::A*>(target.data));
}

// What a layer norm found in each row of a block.
template <class S>
struct RowMoments {
  alignas(64) typename S::A mean[kBlockRows<S>], inverse[kBlockRows<S>];
};

// Calls term(feature) for all features and returns the sum, in four running sums.
template <class S, class Term>
inline typename S::V sum_features(int64_t dim, Term term) {
  typename S::V sums[4] = {};
  int64_t f = 0;
  for (; f + 4 <= dim; f += 4) {
    for (int i = 0; i < 4; ++i) sums[i] += term(f + i);
  }
  for (; f < dim; ++f) sums[0] += term(f);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// to = (x - mean) / sqrt(variance + eps) * weight + bias, row by row of a block; x itself without a norm.
template <class S>
const typename S::A* normalise(const typename S::A* x, const LayerNorm& norm, int64_t rows, int64_t dim,
                               RowMoments<S>& moments, typename S::A* to) {
  using A = typename S::A;
  using V = typename S::V;
  if (!norm.weight) return x;
  const A *weight = static_cast<const A*>(norm.weight), *bias = static_cast<const A*>(norm.bias);
  const A share = 1 / static_cast<A>(dim);
  for (int64_t r = 0; r < rows; r += S::kLanes) {
    const auto at = [&](int64_t f) { return S::load(x + f * kBlockRows<S> + r); };
    const V mean = share * sum_features<S>(dim, at);
    V inverse = share * sum_features<S>(dim, [&](int64_t f) { return (at(f) - mean) * (at(f) - mean); });
    inverse += static_cast<A>(norm.eps);
    for (int i = 0; i < S::kLanes; ++i) inverse[i] = 1 / static_cast<A>(__builtin_sqrt(inverse[i]));
    S::store(moments.mean + r, mean);
    S::store(moments.inverse + r, inverse);
    for (int64_t f = 0; f < dim; ++f) {
      S::store(to + f * kBlockRows<S> + r, (at(f) - mean) * (inverse * weight[f]) + bias[f]);
    }
  }
  return to;
}

// Gradient of a layer norm's input from `grad`, that of its output, in place. x is the input.
template <class S>
void normalise_bwd(const typename S::A* x, const LayerNorm& norm, int64_t rows, int64_t dim,
                   const RowMoments<S>& moments, typename S::A* grad) {
  using A = typename S::A;
  using V = typename S::V;
  if (!norm.weight) return;
  const A *weight = static_cast<const A*>(norm.weight), share = 1 / static_cast<A>(dim);
  for (int64_t r = 0; r < rows; r += S::kLanes) {
    const V mean = S::load(moments.mean + r), inverse = S::load(moments.inverse + r);
    const auto scaled = [&](int64_t f) { return S::load(grad + f * kBlockRows<S> + r) * weight[f]; };
    const auto centred = [&](int64_t f) { return (S::load(x + f * kBlockRows<S> + r) - mean) * inverse; };
    const V along = share * sum_features<S>(dim, [&](int64_t f) { return scaled(f) * centred(f); });
    const V level = share * sum_features<S>(dim, scaled);
    for (int64_t f = 0; f < dim; ++f) {
      S::store(grad + f * kBlockRows<S> + r, inverse * (scaled(f) - level - centred(f) * along));
    }
  }
}

// Products of a weight with blocks, in the element type of sums. bf16_weights.h has those of bfloat16 pairs.
template <class S>
struct PlainWeights {
  using A = typename S::A;
  using Operand = A;
  struct Session {};

  // A block as products read it; `to` has room for it.
  static const A* prepare(const A* block, int64_t, int64_t, A*) { return block; }

  // Rows first .. first + count - 1 of a weight, columns from `column` on, times a block: to [count][rows] (+)=.
  static void multiply(const Matrix& weight, int64_t first, int64_t count, int64_t column, int64_t depth,
                       const A* block, int64_t rows, bool add, A* to) {
    const A* from = static_cast<const A*>(weight.data) + first * weight.stride + column;
    if constexpr (S::kLanes >= 16) {  // narrower vectors do a block of rows as fast
      constexpr int64_t kStep = kBlockRows<S>;
      if (rows == 1) return multiply_few<S, 1>(from, weight.stride, count, block, depth, kStep, add, to);
      if (rows == 2) return multiply_few<S, 2>(from, weight.stride, count, block, depth, kStep, add, to);
      if (rows <= 4) return multiply_few<S, 4>(from, weight.stride, count, block, depth, kStep, add, to);
    }
    const Factor<A> pair{from, block, kBlockRows<S>, depth};
    pcl::multiply<S>({weight.stride, 1, kBlockRows<S>, 1, add}, &pair, 1, count, S::round_up(rows), to);
  }
};

}  // namespace
}  // namespace pcl
