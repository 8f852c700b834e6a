// Vectors of one instruction set, and the few loops on them that the hot kernels share: a register-tiled product, exp,
// transposing copies. Included only by the files that are compiled once per instruction set: everything here is in an
// unnamed namespace, so that no copy can stand in for another, and nothing of the standard library is instantiated.
#pragma once

#include <cstdint>
#include <cstring>

#include "scalar.h"

namespace pcl {
namespace {

// A: element; kBytes: vector width; kTileRows x kTileVecs accumulators fit the registers.
template <class A_, int kBytes, int kTileRows_, int kTileVecs_>
struct Simd {
  using A = A_;
  typedef A V __attribute__((vector_size(kBytes)));
  typedef A Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(A)), may_alias));
  static constexpr int kLanes = kBytes / sizeof(A);
  static constexpr int kTileRows = kTileRows_;
  static constexpr int kTileVecs = kTileVecs_;

  static V load(const A* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(A* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static V fill(A x) { return x - V{}; }
  static int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  static A sum(V v) {
    A total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
  }
  static A max(V v) {
    A most = v[0];
    for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
  }
};

// exp on vectors. Single precision: Cephes' expf, x = n ln 2 + r and a polynomial for exp(r); below -87.33 it is 0.
template <class S>
inline typename S::V exp_v(typename S::V x) {
  using V = typename S::V;
  if constexpr (sizeof(typename S::A) == 8) {
    V y;
    for (int i = 0; i < S::kLanes; ++i) y[i] = __builtin_exp(x[i]);
    return y;
  } else {
    typedef int32_t I __attribute__((vector_size(sizeof(V))));
    const V low = S::fill(-87.33f), high = S::fill(88.37f),
            magic = S::fill(12582912.0f);  // 1.5 * 2^23 rounds to integers
    V y = x < low ? low : x;
    y = y > high ? high : y;
    const V shifted = y * 1.44269504f + magic;
    const V n = shifted - magic;
    const V r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = S::fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    I bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + (127 << 23);
    V power;
    std::memcpy(&power, &bits, sizeof power);
    return x < low ? V{} : p * power;
  }
}

// One factor pair of a product: sum over k < depth of a[r * a_row + k * a_k] * b[k * b_k + column].
template <class A>
struct Factor {
  const A* a;
  const A* b;
  int64_t b_k, depth;
};

// What all tiles of a product share: a's strides, the result and whether it is added to.
template <class A>
struct Product {
  int64_t a_row, a_k, c_row;
  A scale;
  bool add;
};

// c[R][N vectors] = scale * (product of one or two factor pairs) (+ c). Every element is one running sum over k.
template <class S, int R, int N>
inline void multiply_tile(const Product<typename S::A>& product, const Factor<typename S::A>* factors, int count,
                          int64_t row, int64_t column, typename S::A* c) {
  using A = typename S::A;
  using V = typename S::V;
  V sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = V{};
  }
  for (int f = 0; f < count; ++f) {
    const A* a = factors[f].a + row * product.a_row;
    const A* b = factors[f].b + column;
    for (int64_t k = 0; k < factors[f].depth; ++k, a += product.a_k, b += factors[f].b_k) {
      V vb[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) vb[n] = S::load(b + n * S::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V va = S::fill(a[r * product.a_row]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[r][n] += va * vb[n];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      A* to = c + (row + r) * product.c_row + column + n * S::kLanes;
      const V result = product.scale * sums[r][n];
      S::store(to, product.add ? S::load(to) + result : result);
    }
  }
}

template <class S, int R>
inline void multiply_rows(const Product<typename S::A>& product, const Factor<typename S::A>* factors, int count,
                          int64_t row, int64_t columns, typename S::A* c) {
  constexpr int kStep = S::kTileVecs * S::kLanes;
  int64_t column = 0;
  for (; column + kStep <= columns; column += kStep) {
    multiply_tile<S, R, S::kTileVecs>(product, factors, count, row, column, c);
  }
  if constexpr (S::kTileVecs > 3) {
    if (column + 3 * S::kLanes <= columns) {
      multiply_tile<S, R, 3>(product, factors, count, row, column, c);
      column += 3 * S::kLanes;
    }
  }
  if (column + 2 * S::kLanes <= columns) {
    multiply_tile<S, R, 2>(product, factors, count, row, column, c);
    column += 2 * S::kLanes;
  }
  if (column < columns) multiply_tile<S, R, 1>(product, factors, count, row, column, c);
}

// rows <= kTileRows rows of a product, columns a multiple of the vector.
template <class S>
__attribute__((noinline)) void multiply(const Product<typename S::A>& product, const Factor<typename S::A>* factors,
                                        int count, int64_t rows, int64_t columns, typename S::A* c) {
  constexpr int R = S::kTileRows;
  static_assert(R == 4 || R == 6);
  int64_t row = 0;
  for (; row + R <= rows; row += R) multiply_rows<S, R>(product, factors, count, row, columns, c);
  switch (rows - row) {
    case 1:
      return multiply_rows<S, 1>(product, factors, count, row, columns, c);
    case 2:
      return multiply_rows<S, 2>(product, factors, count, row, columns, c);
    case 3:
      return multiply_rows<S, 3>(product, factors, count, row, columns, c);
    case 4:
      if constexpr (R > 4) multiply_rows<S, 4>(product, factors, count, row, columns, c);
      return;
    case 5:
      if constexpr (R > 4) multiply_rows<S, 5>(product, factors, count, row, columns, c);
      return;
    default:
      return;
  }
}

// to[c * to_row + i] = from[i * from_row + c] for i < rows, c < dim; 0 for the other i up to to_row.
template <class T, class A>
void transpose(const T* from, int64_t from_row, int64_t rows, int64_t dim, A* to, int64_t to_row) {
  constexpr int64_t kBlock = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
    const int64_t count = rows - i0 < kBlock ? rows - i0 : kBlock;
    for (int64_t c = 0; c < dim; ++c) {
      for (int64_t i = 0; i < count; ++i) to[c * to_row + i0 + i] = widen(from[(i0 + i) * from_row + c]);
    }
  }
  for (int64_t c = 0; c < dim; ++c) {
    for (int64_t i = rows; i < to_row; ++i) to[c * to_row + i] = 0;
  }
}

// A matrix the products can read: rows of at least `dim` elements, whole vectors.
template <class A>
struct Rows {
  const A* data;
  int64_t stride;
};

// The rows themselves where their type and width allow, else a widened copy in scratch, padded with 0.
template <class S, class T>
Rows<typename S::A> as_rows(const T* from, int64_t from_row, int64_t rows, int64_t dim, typename S::A* scratch) {
  const int64_t wide = S::round_up(dim);
  if constexpr (sizeof(T) == sizeof(typename S::A)) {
    if (wide == dim) return {from, from_row};
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < dim; ++c) scratch[i * wide + c] = widen(from[i * from_row + c]);
    for (int64_t c = dim; c < wide; ++c) scratch[i * wide + c] = 0;
  }
  return {scratch, wide};
}

// Where a product may write rows of type T: in place where type and width allow, else to scratch, copied by flush.
template <class S, class T>
struct Sink {
  T* to;
  int64_t to_row, rows, dim;
  typename S::A* data;
  int64_t stride;

  Sink(T* target, int64_t target_row, int64_t row_count, int64_t width, typename S::A* scratch)
      : to(target), to_row(target_row), rows(row_count), dim(width), data(scratch), stride(S::round_up(width)) {
    if constexpr (sizeof(T) == sizeof(typename S::A)) {
      if (stride == dim) {
        data = to;
        stride = to_row;
      }
    }
  }
  void flush() const {
    if (static_cast<const void*>(data) == static_cast<const void*>(to)) return;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < dim; ++c) narrow(data[i * stride + c], to + i * to_row + c);
    }
  }
};

// Hands out 64-byte aligned pieces of the scratch a task was given.
template <class A>
struct Pieces {
  A* next;

  A* take(int64_t count) {
    A* piece = next;
    next += (count + 15) / 16 * 16;
    return piece;
  }
};

}  // namespace
}  // namespace pcl
