// The product of bf16_product.h on matrix tiles: AMX, and the same tiles in plain C++, so that loops, tile shapes and
// edges can be tested on any machine.
//
// Tiles are a type with eight tiles 0..7 of 16 rows of 64 bytes and
//   configure(), release()      before a thread's first use of a tile and after its last, again for every Session
//   zero<t>(), load<t>(from, stride in bytes), store<t>(to, stride in bytes)
//   dot<c, a, b>()              c += a b: a holds rows of 16 pairs, b 16 rows of pairs
#pragma once

#include "bf16_product.h"

namespace pcl {
namespace {

// What LDTILECFG reads: palette 1, the shape of every tile.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];

  TileShapes() : palette(1), start_row(0), reserved{}, row_bytes{}, rows{} {
    for (int t = 0; t < 8; ++t) {
      row_bytes[t] = 64;
      rows[t] = 16;
    }
  }
};
static_assert(sizeof(TileShapes) == 64);

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // the latter in clang before 15
// Not the compiler's intrinsics: gcc's take no template parameters, and do not say that they read memory.
struct AmxTiles {
  static void configure() {
    const TileShapes shapes;
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  static void release() { asm volatile("tilerelease"); }
  template <int t>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  template <int t>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};
#endif

// TDPBF16PS and its companions as Intel's manual defines them (Instruction Set Reference, volume 2).
struct EmulatedTiles {
  static void configure() { shapes() = TileShapes(); }
  static void release() { shapes().palette = 0; }
  template <int t>
  static void zero() {
    std::memset(tile<t>(), 0, 1024);
  }
  template <int t>
  static void load(const void* from, int64_t stride) {
    char* to = tile<t>();
    std::memset(to, 0, 1024);
    for (int r = 0; r < shapes().rows[t]; ++r) {
      std::memcpy(to + 64 * r, static_cast<const char*>(from) + r * stride, shapes().row_bytes[t]);
    }
  }
  template <int t>
  static void store(void* to, int64_t stride) {
    for (int r = 0; r < shapes().rows[t]; ++r) {
      std::memcpy(static_cast<char*>(to) + r * stride, tile<t>() + 64 * r, shapes().row_bytes[t]);
    }
  }
  // Even and odd elements are summed apart, then added; one rounding each time, denormals are 0 before and after.
  template <int c, int a, int b>
  static void dot() {
    for (int m = 0; m < shapes().rows[c]; ++m) {
      float sums[2][16] = {};
      for (int k = 0; k < shapes().row_bytes[a] / 4; ++k) {
        for (int half = 0; half < 2; ++half) {
          const float left = element(tile<a>(), m, 2 * k + half);
          for (int n = 0; n < shapes().row_bytes[c] / 4; ++n) {
            float& sum = sums[half][n];
            sum = flush(__builtin_fmaf(left, element(tile<b>(), k, 2 * n + half), sum));
          }
        }
      }
      for (int n = 0; n < shapes().row_bytes[c] / 4; ++n) {
        float sum;
        char* at = tile<c>() + 64 * m + 4 * n;
        std::memcpy(&sum, at, sizeof sum);
        sum = flush(flush(sum) + flush(sums[0][n] + sums[1][n]));
        std::memcpy(at, &sum, sizeof sum);
      }
    }
  }

 private:
  static TileShapes& shapes() {
    static thread_local TileShapes shapes;
    return shapes;
  }
  // Without a configuration there is no tile to use: the processor would raise an exception.
  template <int t>
  static char* tile() {
    static thread_local char tiles[8][1024];
    if (shapes().palette != 1) __builtin_trap();
    return tiles[t];
  }
  static float flush(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? 0 * x : x; }
  static float element(const char* tile, int row, int column) {
    Bfloat16 half;
    std::memcpy(&half, tile + 64 * row + 2 * column, sizeof half);
    return flush(widen(half));
  }
};

template <class Tiles>
struct TileEngine {
  static constexpr int64_t kRows = 32, kDepth = 16, kRowPad = 16;
  struct Session {
    Session() { Tiles::configure(); }
    ~Session() { Tiles::release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  template <class Store>
  static __attribute__((noinline)) void multiply(Left a, Right b, int64_t depth, int64_t rows, int64_t panels,
                                                 Store store) {
    for (int64_t row = 0; row < rows; row += 32) {
      const bool two_rows = rows - row > 16;
      for (int64_t panel = 0; panel < panels; panel += 2) {
        const bool two_panels = panels - panel > 1;
        if (two_rows) {
          two_panels ? tiles<2, 2>(a, b, depth, row, rows, panel, store)
                     : tiles<2, 1>(a, b, depth, row, rows, panel, store);
        } else {
          two_panels ? tiles<1, 2>(a, b, depth, row, rows, panel, store)
                     : tiles<1, 1>(a, b, depth, row, rows, panel, store);
        }
      }
    }
  }

 private:
  // Tiles 0..3 hold sums, 4 and 5 rows of a, 6 and 7 panels of b.
  template <int R, int N, class Store>
  static void tiles(Left a, Right b, int64_t depth, int64_t row, int64_t rows, int64_t panel, Store store) {
    constexpr int64_t kPair = sizeof(uint32_t);
    const uint32_t* left = a.data + row * a.row;
    const uint32_t* right = b.data + panel * b.panel;
    Tiles::template zero<0>();
    if constexpr (N > 1) Tiles::template zero<1>();
    if constexpr (R > 1) Tiles::template zero<2>();
    if constexpr (R > 1 && N > 1) Tiles::template zero<3>();
    for (int64_t k = 0; k < depth; k += kDepth) {
      Tiles::template load<4>(left + k, a.row * kPair);
      Tiles::template load<6>(right + k * b.k, b.k * kPair);
      Tiles::template dot<0, 4, 6>();
      if constexpr (N > 1) {
        Tiles::template load<7>(right + k * b.k + b.panel, b.k * kPair);
        Tiles::template dot<1, 4, 7>();
      }
      if constexpr (R > 1) {
        Tiles::template load<5>(left + 16 * a.row + k, a.row * kPair);
        Tiles::template dot<2, 5, 6>();
      }
      if constexpr (R > 1 && N > 1) Tiles::template dot<3, 5, 7>();
    }
    hand_out<0>(row, rows, panel, store);
    if constexpr (N > 1) hand_out<1>(row, rows, panel + 1, store);
    if constexpr (R > 1) hand_out<2>(row + 16, rows, panel, store);
    if constexpr (R > 1 && N > 1) hand_out<3>(row + 16, rows, panel + 1, store);
  }

  template <int t, class Store>
  static void hand_out(int64_t row, int64_t rows, int64_t panel, Store store) {
    if constexpr (kTakesTiles<Store>)
      return Tiles::template store<t>(store.at(row, panel), store.stride * sizeof(float));
    alignas(64) float sums[16][kLanes];
    Tiles::template store<t>(sums, sizeof sums[0]);
    const int64_t count = least(rows - row, 16);
    for (int64_t r = 0; r < count; ++r) store(row + r, panel, Wide::load(sums[r]));
  }
};

}  // namespace
}  // namespace pcl
