// Products of bfloat16 pairs with float sums: sum over k < depth of a[row, k] * b[k, column], k counting pairs.
//
// An engine is a type with
//   multiply(Left a, Right b, depth, rows, panels, store)   calls store(row, panel, sums) once for every row and every
//                                                           panel of 16 columns
//   kRows      rows to give at once where there is a choice
//   kDepth     depth is a multiple of this many pairs; a and b are 0 where they are padded for it
//   kRowPad    rows of a that can be read: a multiple of this. Above 1, a.k is 1: pairs of a row lie side by side
//   Session    lives while a thread multiplies
// PairEngine is for AVX512_BF16; amx_tiles.h has the engine for AMX. Every sum runs over k in order and depends on
// nothing but its row of a and its column of b.
#pragma once

#include "bf16_pairs.h"

namespace pcl {
namespace {

// Pair k of row r is data[r * row + k * this->k].
struct Left {
  const uint32_t* data;
  int64_t row, k;
};

// Columns 16 * p .. 16 * p + 15 of pair k begin at data[k * this->k + p * panel].
struct Right {
  const uint32_t* data;
  int64_t k, panel;
};

// Whether an engine may write a tile itself where store.at(row, panel) says, store.stride numbers from row to row: all
// 16 rows of it, however many were asked for.
template <class Store>
constexpr bool kTakesTiles = false;

#if defined(__AVX512BF16__)
struct PairEngine {
  static constexpr int64_t kRows = 12, kDepth = 1, kRowPad = 1;
  struct Session {};

  template <class Store>
  static __attribute__((noinline)) void multiply(Left a, Right b, int64_t depth, int64_t rows, int64_t panels,
                                                 Store store) {
    int64_t panel = 0;
    for (; panels - panel >= 4 && panels - panel != 5; panel += 4) columns<4>(a, b, depth, rows, panel, store);
    if (panels - panel >= 3) {
      columns<3>(a, b, depth, rows, panel, store);
      panel += 3;
    }
    if (panels - panel == 2) columns<2>(a, b, depth, rows, panel, store);
    if (panels - panel == 1) columns<1>(a, b, depth, rows, panel, store);
  }

 private:
  // Enough sums at once to hide how long one takes.
  template <int N, class Store>
  static void columns(Left a, Right b, int64_t depth, int64_t rows, int64_t panel, Store store) {
    b.data += panel * b.panel;
    int64_t row = 0;
    if constexpr (N <= 2) {
      for (; rows - row >= 12; row += 12) tile<12, N>(a, b, depth, row, panel, store);
    }
    for (; rows - row >= 6; row += 6) tile<6, N>(a, b, depth, row, panel, store);
    if (rows - row >= 4) {
      tile<4, N>(a, b, depth, row, panel, store);
      row += 4;
    }
    if (rows - row >= 2) {
      tile<2, N>(a, b, depth, row, panel, store);
      row += 2;
    }
    if (rows - row == 1) tile<1, N>(a, b, depth, row, panel, store);
  }

  template <int R, int N, class Store>
  static void tile(Left a, Right b, int64_t depth, int64_t row, int64_t panel, Store store) {
    Floats sums[R][N];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[r][n] = Floats{};
    }
    const uint32_t* left = a.data + row * a.row;
    const uint32_t* right = b.data;
    for (int64_t k = depth; k > 0; --k, left += a.k, right += b.k) {
      Floats columns[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        columns[n] = reinterpret_cast<Floats>(load_pairs(right + n * b.panel));
        Wide::hold(columns[n]);
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        auto pair = reinterpret_cast<Floats>(Pairs{} + left[r * a.row]);
        Wide::hold(pair);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          sums[r][n] = dot_pairs(sums[r][n], reinterpret_cast<Pairs>(pair), reinterpret_cast<Pairs>(columns[n]));
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(row + r, panel + n, sums[r][n]);
    }
  }
};
#endif

}  // namespace
}  // namespace pcl
