// What the lanes of a warp do together, lane by lane as the PTX manual lays out registers and matrices.
#pragma once

#include <cstdint>
#include <cstring>

#include "../scalars.h"
#include "block.h"

namespace pcl {

template <class T>
T shuffle(T value, int from, int line = __builtin_LINE()) {
  struct Lane {
    T value, result;
    int from;
  } lane{value, value, from};
  const auto work = [](void* const* lanes) {
    for (int i = 0; i < emulated::kLanes; ++i) {
      auto* to = static_cast<Lane*>(lanes[i]);
      to->result = static_cast<const Lane*>(lanes[to->from & (emulated::kLanes - 1)])->value;
    }
  };
  emulated::meet_warp("shuffle", line, work, &lane);
  return lane.result;
}

template <class T>
T shuffle_xor(T value, int mask, int line = __builtin_LINE()) {
  return shuffle(value, emulated::place().thread % emulated::kLanes ^ mask, line);
}

inline unsigned ballot(bool condition, int line = __builtin_LINE()) {
  struct Lane {
    bool condition;
    unsigned result;
  } lane{condition, 0};
  const auto work = [](void* const* lanes) {
    unsigned all = 0;
    for (int i = 0; i < emulated::kLanes; ++i) all |= unsigned{static_cast<Lane*>(lanes[i])->condition} << i;
    for (int i = 0; i < emulated::kLanes; ++i) static_cast<Lane*>(lanes[i])->result = all;
  };
  emulated::meet_warp("ballot", line, work, &lane);
  return lane.result;
}

template <int kMatrices, bool kTransposed = false>
void ldmatrix(uint32_t (&out)[kMatrices], const void* row, int line = __builtin_LINE()) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  struct Lane {
    const void* row;
    uint32_t* out;
  } lane{row, out};
  if (emulated::place().thread % emulated::kLanes < 8 * kMatrices) emulated::check_shared("ldmatrix", row, 16);
  const auto work = [](void* const* lanes) {
    for (int m = 0; m < kMatrices; ++m) {
      uint16_t numbers[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(numbers[i], static_cast<const Lane*>(lanes[8 * m + i])->row, 16);
      for (int i = 0; i < emulated::kLanes; ++i) {
        const int row = i / 4, column = i % 4 * 2;
        const uint16_t low = kTransposed ? numbers[column][row] : numbers[row][column];
        const uint16_t high = kTransposed ? numbers[column + 1][row] : numbers[row][column + 1];
        static_cast<Lane*>(lanes[i])->out[m] = low | uint32_t{high} << 16;
      }
    }
  };
  emulated::meet_warp(kTransposed ? "transposed ldmatrix" : "ldmatrix", line, work, &lane);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } lane{d, a, b};
  const auto work = [](void* const* lanes) {
    float left[16][16], right[8][16];  // rows of a; columns of b
    for (int i = 0; i < emulated::kLanes; ++i) {
      const auto* from = static_cast<const Lane*>(lanes[i]);
      const int group = i / 4, pair = i % 4 * 2;
      for (int j = 0; j < 4; ++j) {
        float* to = &left[group + j % 2 * 8][pair + j / 2 * 8];
        unpack2<T>(from->a[j], to[0], to[1]);
      }
      for (int j = 0; j < 2; ++j) {
        float* to = &right[group][pair + j * 8];
        unpack2<T>(from->b[j], to[0], to[1]);
      }
    }
    for (int i = 0; i < emulated::kLanes; ++i) {
      float* sum = static_cast<Lane*>(lanes[i])->d;
      for (int j = 0; j < 4; ++j) {
        const int row = i / 4 + j / 2 * 8, column = i % 4 * 2 + j % 2;
        for (int k = 0; k < 16; ++k) sum[j] += left[row][k] * right[column][k];
      }
    }
  };
  emulated::meet_warp("mma", line, work, &lane);
}

}  // namespace pcl
