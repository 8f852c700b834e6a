// Transposing 32-bit elements by quarters of 16 bytes: vectors take the quarters of rows from memory as they lie, and
// what remains is to transpose four by four within the quarters, which costs half the shuffles of whole vectors.
#pragma once

#include <cstdint>
#include <utility>

#include "simd.h"

namespace pcl {
namespace {

template <int kLanes>
struct FloatVector {
  typedef float V __attribute__((vector_size(4 * kLanes)));
};

// low and high as one vector.
template <int kLanes, int... kIndex>
inline typename FloatVector<kLanes>::V join(typename FloatVector<kLanes / 2>::V low,
                                            typename FloatVector<kLanes / 2>::V high,
                                            std::integer_sequence<int, kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(low, high, kIndex...);
#else
  union {
    typename FloatVector<kLanes / 2>::V halves[2];
    typename FloatVector<kLanes>::V whole;
  } both{{low, high}};
  return both.whole;
#endif
}

// The 16 bytes at from, from + step, from + 2 step ..., `count` of them and then zeros, as one vector.
template <int kLanes>
inline typename FloatVector<kLanes>::V gather_quarters(const float* from, int64_t step, int64_t count) {
  if constexpr (kLanes == 4) {
    typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
    return count > 0 ? *reinterpret_cast<const Unaligned*>(from) : typename FloatVector<4>::V{};
  } else {
    return join<kLanes>(gather_quarters<kLanes / 2>(from, step, count),
                        gather_quarters<kLanes / 2>(from + kLanes / 8 * step, step, count - kLanes / 8),
                        std::make_integer_sequence<int, kLanes>{});
  }
}

// Within each quarter: a and b taken alternately from their kHalf-th half, `kRun` elements at a time.
template <class S, int kHalf, int kRun, int... kIndex>
inline typename S::V zip_quarters(typename S::V a, typename S::V b, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(
      a, b, (kIndex / 4 * 4 + 2 * kHalf + kIndex % 4 / (2 * kRun) + kIndex % kRun + kIndex / kRun % 2 * S::kLanes)...);
#else
  return __builtin_shuffle(a, b,
                           typename S::I{(kIndex / 4 * 4 + 2 * kHalf + kIndex % 4 / (2 * kRun) + kIndex % kRun +
                                          kIndex / kRun % 2 * S::kLanes)...});
#endif
}

// to[c * to_row + i] = from[i * from_row + c] for kLanes rows i and four columns c; rows from `rows` on are 0.
template <class S>
inline void transpose_four(const float* from, int64_t from_row, int64_t rows, float* to, int64_t to_row) {
  using V = typename S::V;
  using Lanes = std::make_integer_sequence<int, S::kLanes>;
  V in[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) in[i] = gather_quarters<S::kLanes>(from + i * from_row, 4 * from_row, (rows - i + 3) / 4);
  const V low01 = zip_quarters<S, 0, 1>(in[0], in[1], Lanes{}), high01 = zip_quarters<S, 1, 1>(in[0], in[1], Lanes{});
  const V low23 = zip_quarters<S, 0, 1>(in[2], in[3], Lanes{}), high23 = zip_quarters<S, 1, 1>(in[2], in[3], Lanes{});
  S::store(to, zip_quarters<S, 0, 2>(low01, low23, Lanes{}));
  S::store(to + to_row, zip_quarters<S, 1, 2>(low01, low23, Lanes{}));
  S::store(to + 2 * to_row, zip_quarters<S, 0, 2>(high01, high23, Lanes{}));
  S::store(to + 3 * to_row, zip_quarters<S, 1, 2>(high01, high23, Lanes{}));
}

// As transpose_block: a square of kLanes x kLanes.
template <class S>
inline void transpose_square(const typename S::A* from, int64_t from_row, int64_t rows, typename S::A* to,
                             int64_t to_row) {
  if constexpr (sizeof(typename S::A) == 8) {
    transpose_block<S>(from, from_row, rows, to, to_row);
  } else if (rows >= S::kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < S::kLanes; c += 4) transpose_four<S>(from + c, from_row, S::kLanes, to + c * to_row, to_row);
  } else {
    for (int c = 0; c < S::kLanes; c += 4) transpose_four<S>(from + c, from_row, rows, to + c * to_row, to_row);
  }
}

}  // namespace
}  // namespace pcl
