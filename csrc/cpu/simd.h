// Vectors of one instruction set, and the few loops on them that the hot kernels share: a register-tiled product, exp,
// transposing copies. Included only by the files that are compiled once per instruction set: everything here is in an
// unnamed namespace, so that no copy can stand in for another, and nothing of the standard library is instantiated.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "scalar.h"

namespace pcl {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

// A: element; kBytes: vector width; kTileRows x kTileVecs accumulators fit the registers.
template <class A_, int kBytes, int kTileRows_, int kTileVecs_>
struct Simd {
  using A = A_;
  typedef A V __attribute__((vector_size(kBytes)));
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef Index I __attribute__((vector_size(kBytes)));
  typedef A Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(A)), may_alias));
  static constexpr int kLanes = kBytes / sizeof(A);
  static constexpr int kTileRows = kTileRows_;
  static constexpr int kTileVecs = kTileVecs_;

  static V load(const A* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(A* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static V fill(A x) { return x - V{}; }
  // Makes a register of v, where one is large enough: compilers would load it again for each of its uses, or make one
  // rounding of the product it is and the sum it becomes part of.
  static void hold(V& v) {
    if constexpr (kBytes <= kRegisterBytes) {
#if defined(__x86_64__)
      asm("" : "+v"(v));
#elif defined(__aarch64__)
      asm("" : "+w"(v));
#endif
    }
    static_cast<void>(v);
  }
  // keep(n): all ones in lanes below n, which is at least 1 and at most kLanes; select by it with ?:.
  static I keep(int64_t n) { return lane_numbers() < (static_cast<Index>(n) - I{}); }
  static int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  // The sum or the largest of all lanes, in every lane; halves are added to halves, in a fixed order.
  static V sum(V v) {
    return fold(v, [](V a, V b) { return a + b; });
  }
  static V max(V v) {
    return fold(v, [](V a, V b) { return a > b ? a : b; });
  }

 private:
  static I lane_numbers() {
    I numbers;
    for (int i = 0; i < kLanes; ++i) numbers[i] = i;
    return numbers;
  }

  template <int kBy, int... kIndex>
  static V rotate(V v, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(v, v, ((kIndex + kBy) % kLanes)...);
#else
    return __builtin_shuffle(v, I{((kIndex + kBy) % kLanes)...});
#endif
  }

  template <int kHalf = kLanes / 2, class Join>
  static V fold(V v, Join join) {
    v = join(v, rotate<kHalf>(v, std::make_integer_sequence<int, kLanes>{}));
    if constexpr (kHalf > 1) v = fold<kHalf / 2>(v, join);
    return v;
  }
};

// exp on vectors, of at most 88; below -87.33 it is 0. Single precision: x = (n + f) ln 2 and a polynomial for 2^f, the
// minimax one of relative error 9.1e-8 that is 1 at 0. The part of x / ln 2 that its constant drops, 1.3e-8 of it, is
// not made up for: where it could be seen, exp is too small to matter in a sum that holds exp(0).
template <class S>
inline typename S::V exp_v(typename S::V x) {
  using V = typename S::V;
  if constexpr (sizeof(typename S::A) == 8) {
    V y;
    for (int i = 0; i < S::kLanes; ++i) y[i] = __builtin_exp(x[i]);
    return y;
  } else {
    using I = typename S::I;
    // Adding 1.5 * 2^23 rounds to an integer in the last bits; 127 makes it the exponent of a float.
    const V per_ln2 = S::fill(1.44269504f), magic = S::fill(12582912.0f + 127.0f);
    const V shifted = x * per_ln2 + magic;
    const V f = x * per_ln2 - (shifted - magic);
    V p = S::fill(1.326472731e-3f);
    p = p * f + 9.671512991e-3f;
    p = p * f + 5.550733581e-2f;
    p = p * f + 2.402224243e-1f;
    p = p * f + 6.931470037e-1f;
    p = p * f + 1.0f;
    I bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;
    V power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.33f ? V{} : p * power;
  }
}

// One factor pair of a product: sum over k < depth of a[r * a_row + k * a_k] * b[k * b_k + column].
template <class A>
struct Factor {
  const A* a;
  const A* b;
  int64_t b_k, depth;
};

// What all tiles of a product share: a's strides, the result, what it is scaled by, and whether it is added to.
template <class A>
struct Product {
  int64_t a_row, a_k, c_row;
  A scale;
  bool add;
  const A* row_scale = nullptr;  // instead of scale, one for each row
};

// c[R][N vectors] = scale * (product of one or two factor pairs) (+ c). Every element is one running sum over k.
template <class S, int R, int N>
inline void multiply_tile(const Product<typename S::A>& product, const Factor<typename S::A>* factors, int count,
                          int64_t row, int64_t column, typename S::A* c) {
  using A = typename S::A;
  using V = typename S::V;
  const int64_t a_row = product.a_row, a_k = product.a_k, c_row = product.c_row;
  const bool add = product.add;
  V sums[R][N];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = V{};
  }
  for (int f = 0; f < count; ++f) {
    const A* a = factors[f].a + row * a_row;
    const A* b = factors[f].b + column;
    const int64_t b_k = factors[f].b_k;
    for (int64_t k = factors[f].depth; k > 0; --k, a += a_k, b += b_k) {
      V vb[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        vb[n] = S::load(b + n * S::kLanes);
        if (R > 1) S::hold(vb[n]);
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        V va = S::fill(a[r * a_row]);
        if (N > 1) S::hold(va);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[r][n] += va * vb[n];
      }
    }
  }
  c += row * c_row + column;
  const int64_t step = product.row_scale ? 1 : 0;
  const A one = product.scale, *scales = product.row_scale ? product.row_scale + row : &one;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r, c += c_row) {
    const V scale = S::fill(scales[r * step]);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      V result = scale * sums[r][n];
      if (add) {
        S::hold(result);  // in two roundings everywhere: the same bits whatever R is
        result += S::load(c + n * S::kLanes);
      }
      S::store(c + n * S::kLanes, result);
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

constexpr int64_t kLongestSum = 256;  // terms of one running sum: its error grows with their number

// A product, columns a multiple of the vector. Sums of more than kLongestSum terms are sums of shorter ones.
template <class S>
__attribute__((noinline)) void multiply(const Product<typename S::A>& product, const Factor<typename S::A>* factors,
                                        int count, int64_t rows, int64_t columns, typename S::A* c) {
  constexpr int R = S::kTileRows;
  static_assert(R == 4 || R == 6);
  int64_t terms = 0;
  for (int f = 0; f < count; ++f) terms += factors[f].depth;
  if (terms > kLongestSum) {
    Product<typename S::A> part = product;
    for (int f = 0; f < count; ++f) {
      const Factor<typename S::A>& all = factors[f];
      for (int64_t k = 0; k < all.depth; k += kLongestSum, part.add = true) {
        const int64_t depth = all.depth - k < kLongestSum ? all.depth - k : kLongestSum;
        const Factor<typename S::A> piece{all.a + k * product.a_k, all.b + k * all.b_k, all.b_k, depth};
        multiply<S>(part, &piece, 1, rows, columns, c);
      }
    }
    return;
  }
  int64_t row = 0;
  if (columns == S::kLanes) {  // few sums a row: more rows at once hide how long one takes
    for (; row + 2 * R <= rows; row += 2 * R) multiply_tile<S, 2 * R, 1>(product, factors, count, row, 0, c);
  }
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

// Lanes of two vectors taken alternately: the first halves for kHalf 0, the second halves for 1.
template <class S, int kHalf, int... kIndex>
inline typename S::V interleave(typename S::V a, typename S::V b, std::integer_sequence<int, kIndex...>) {
  constexpr int W = S::kLanes;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (kHalf * W / 2 + kIndex / 2 + kIndex % 2 * W)...);
#else
  return __builtin_shuffle(a, b, typename S::I{(kHalf * W / 2 + kIndex / 2 + kIndex % 2 * W)...});
#endif
}

// columns[c][i] = from[i * from_row + c] for a square block; rows from `rows` on are 0.
template <class S>
inline void load_columns(const typename S::A* from, int64_t from_row, int64_t rows, typename S::V* columns) {
  using V = typename S::V;
  constexpr int W = S::kLanes;
  using Lanes = std::make_integer_sequence<int, W>;
  V next[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) columns[i] = i < rows ? S::load(from + i * from_row) : V{};
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = interleave<S, 0>(columns[i], columns[i + W / 2], Lanes{});
      next[2 * i + 1] = interleave<S, 1>(columns[i], columns[i + W / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) columns[i] = next[i];
  }
}

// The same to memory: to[c * to_row + i].
template <class S>
inline void transpose_block(const typename S::A* from, int64_t from_row, int64_t rows, typename S::A* to,
                            int64_t to_row) {
  typename S::V columns[S::kLanes];
  load_columns<S>(from, from_row, rows, columns);
#pragma GCC unroll 16
  for (int i = 0; i < S::kLanes; ++i) S::store(to + i * to_row, columns[i]);
}

// to[c * to_row + i] = from[i * stride + c] for i < rows and c < columns, a multiple of the vector; 0 for the other
// i < to_row, the rows rounded up.
template <class S>
__attribute__((noinline)) void transpose(const typename S::A* from, int64_t stride, int64_t rows, int64_t columns,
                                         typename S::A* to, int64_t to_row) {
  constexpr int W = S::kLanes;
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t c = 0; c < columns; c += W) {
      const typename S::A* block = from + i * stride + c;
      if (rows - i >= W) {
        transpose_block<S>(block, stride, W, to + c * to_row + i, to_row);
      } else {
        transpose_block<S>(block, stride, rows - i, to + c * to_row + i, to_row);
      }
    }
  }
}

// A matrix the products can read: rows of at least `dim` elements, whole vectors.
template <class A>
struct Rows {
  const A* data;
  int64_t stride;
};

// A widened copy in scratch, padded with 0. Rows that are read again and again are copied even where they could be read
// in place: their stride in a [T, H, d] tensor maps them to a few sets of the cache.
template <class S, class T>
inline Rows<typename S::A> copy_rows(const T* from, int64_t from_row, int64_t rows, int64_t dim,
                                     typename S::A* scratch) {
  const int64_t wide = S::round_up(dim);
  for (int64_t i = 0; i < rows; ++i) {
    if constexpr (sizeof(T) == sizeof(typename S::A)) {
      if (wide == dim) {
        for (int64_t c = 0; c < wide; c += S::kLanes)
          S::store(scratch + i * wide + c, S::load(from + i * from_row + c));
        continue;
      }
    }
    for (int64_t c = 0; c < dim; ++c) scratch[i * wide + c] = widen(from[i * from_row + c]);
    for (int64_t c = dim; c < wide; ++c) scratch[i * wide + c] = 0;
  }
  return {scratch, wide};
}

// The rows themselves where their type and width allow, else a copy.
template <class S, class T>
inline Rows<typename S::A> as_rows(const T* from, int64_t from_row, int64_t rows, int64_t dim, typename S::A* scratch) {
  if constexpr (sizeof(T) == sizeof(typename S::A)) {
    if (S::round_up(dim) == dim) return {from, from_row};
  }
  return copy_rows<S>(from, from_row, rows, dim, scratch);
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
