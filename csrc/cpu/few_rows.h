// A weight times few rows. In a block's product every lane is a row, which for the one row of a request leaves most of
// them idle; here the lanes are features of the weight, which is transposed in registers on the way. Every sum is made
// in the order of multiply: a row has the same bits either way. One row takes half of a block's time, four take 3/4.
#pragma once

#include "../linear.h"
#include "simd.h"

namespace pcl {
namespace {

// sums[r][i] += weight[i * stride + k] * x[k * x_k + r] for k < depth; features from `features` on have a weight of 0.
template <class S, int R>
inline void add_products(const typename S::A* weight, int64_t stride, int64_t features, const typename S::A* x,
                         int64_t x_k, int64_t depth, typename S::V (&sums)[R]) {
  using V = typename S::V;
  constexpr int W = S::kLanes;
  int64_t k = 0;
  for (; k + W <= depth; k += W) {
    V columns[W];
    load_columns<S>(weight + k, stride, features, columns);
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r] += S::fill(x[(k + c) * x_k + r]) * columns[c];
    }
  }
  for (; k < depth; ++k) {
    V column{};
    for (int i = 0; i < W && i < features; ++i) column[i] = weight[i * stride + k];
    for (int r = 0; r < R; ++r) sums[r] += S::fill(x[k * x_k + r]) * column;
  }
}

// to[f * step + r] (+)= sum over k < depth of weight[f * stride + k] * x[k * step + r], for f < count and r < R.
template <class S, int R>
void multiply_few(const typename S::A* weight, int64_t stride, int64_t count, const typename S::A* x, int64_t depth,
                  int64_t step, bool add, typename S::A* to) {
  using V = typename S::V;
  constexpr int W = S::kLanes;
  for (int64_t f = 0; f < count; f += W) {
    const int64_t features = count - f < W ? count - f : W;
    V total[R] = {};
    for (int r = 0; add && r < R; ++r) {
      for (int64_t i = 0; i < features; ++i) total[r][i] = to[(f + i) * step + r];
    }
    for (int64_t k = 0; k < depth; k += kLongestSum) {
      const int64_t terms = depth - k < kLongestSum ? depth - k : kLongestSum;
      const typename S::A* from = weight + f * stride + k;
      V sums[R] = {};
      if (features == W) {
        add_products<S, R>(from, stride, W, x + k * step, step, terms, sums);
      } else {
        add_products<S, R>(from, stride, features, x + k * step, step, terms, sums);
      }
      for (int r = 0; r < R; ++r) total[r] = add || k ? total[r] + sums[r] : sums[r];
    }
    for (int r = 0; r < R; ++r) {
      for (int64_t i = 0; i < features; ++i) to[(f + i) * step + r] = total[r][i];
    }
  }
}

}  // namespace
}  // namespace pcl
