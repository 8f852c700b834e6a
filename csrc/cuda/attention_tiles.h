// What attention on a GPU is made of: tiles of 16 rows of one head in shared memory, and the two products that every
// pass is written with. Products of bf16 and fp16 run on tensor cores, of float by fused multiply-adds.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.h"

namespace pcl {

inline constexpr int kTileRows = 16;

// Rows of kDim numbers in shared memory, 16 bytes a chunk. Chunks are swizzled so that one chunk of 8 rows in a row
// lies in all banks, whatever the width.
template <class T, int kDim>
struct Rows {
  static constexpr int kChunks = kDim * static_cast<int>(sizeof(T)) / 16;
  static constexpr int kBytes = kChunks * 16;
  static constexpr int kTileBytes = kTileRows * kBytes;

  __device__ __forceinline__ static int place(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row / (8 / kAligned) & (kAligned - 1)))) * 16;
  }
  // From a chunk of a row to the one `more` further on, whose number has the same bits and those of `more`: what a lane
  // holds of an address is the same for all.
  template <class Byte>
  __device__ __forceinline__ static Byte* move(Byte* chunk, int more) {
    return flip(chunk, (more & (kAligned - 1)) * 16) + (more & ~(kAligned - 1)) * 16;
  }

  // From a row below kDown to the one `rows` further on, a multiple of kDown.
  template <class Byte>
  __device__ __forceinline__ static Byte* move_down(Byte* chunk, int rows) {
    return flip(chunk, (rows / (8 / kAligned) & (kAligned - 1)) * 16) + rows * kBytes;
  }

  static constexpr int kAcross = kChunks & -kChunks, kDown = kWarp / kAcross;
  static constexpr int kAligned = (kChunks & -kChunks) < 8 ? (kChunks & -kChunks) : 8;
};

// One head of a packed tensor; the head is part of data.
template <class T>
struct Head {
  const T* data;
  int64_t stride;
};

// Numbers of a 16 x 16 block as a warp holds them: lane i has rows i / 4 and i / 4 + 8, and of each the columns
// 2 (i % 4) and the next one, and 8 further on.
struct Block {
  float at[8];

  __device__ __forceinline__ static int row(int i) { return lane_index() / 4 + (i & 2) * 4; }
  __device__ __forceinline__ static int column(int i) { return lane_index() % 4 * 2 + (i & 1) + (i & 4) * 2; }
  // row less column
  __device__ __forceinline__ static int below(int i) {
    return lane_index() / 4 - lane_index() % 4 * 2 + (i & 2) * 4 - (i & 1) - (i & 4) * 2;
  }
};

// Which columns of a block its rows see: the first `count`; on the diagonal, instead, those up to a row's own number.
struct Seen {
  int count;
  bool diagonal;

  __device__ __forceinline__ bool all() const { return !diagonal && count >= kTileRows; }
  __device__ __forceinline__ bool at(int i) const { return Block::column(i) < (diagonal ? Block::row(i) + 1 : count); }
};

// A 16 x kDim block, rows as above: sums[j] are the columns 8 j + 2 (i % 4) and the next one of both rows.
template <int kDim>
struct Wide {
  float sums[kDim / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] = 0.f;
    }
  }

  __device__ __forceinline__ void scale(float first, float second) {
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      sums[j][0] *= first;
      sums[j][1] *= first;
      sums[j][2] *= second;
      sums[j][3] *= second;
    }
  }
};

// A warp copies `count` rows of a tile from memory without waiting, and fills it up with zeros. It copies kDown rows at
// a time, of each kAcross chunks side by side: what a lane needs of its place it finds once.
template <class T, int kDim>
__device__ __forceinline__ void load_tile(unsigned char* tile, Head<T> from, int64_t first, int count) {
  using R = Rows<T, kDim>;
  constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
  const int row = lane_index() / R::kAcross, chunk = lane_index() % R::kAcross, left = count - row;
  const int64_t offset = (first + row) * from.stride + chunk * kWidth;
  const T* at = from.data + offset;
  unsigned char* const to = tile + R::place(row, chunk);
#pragma unroll
  for (int i = 0; i < kTileRows; i += R::kDown) {
#pragma unroll
    for (int j = 0; j < R::kChunks; j += R::kAcross) {
      cp_async<16>(R::move_down(to, i) + 16 * j, at + j * kWidth, left > i);
    }
    at += R::kDown * from.stride;
  }
}

// A warp asks for `count` rows of a tile that it will load later.
template <class T, int kDim>
__device__ __forceinline__ void prefetch_tile(Head<T> from, int64_t first, int count) {
  constexpr int kEach = 64 / static_cast<int>(sizeof(T));  // numbers
  const int row = lane_index() % kTileRows, part = lane_index() / kTileRows;
  const T* const at = from.data + (first + row) * from.stride;
#pragma unroll
  for (int i = 0; i < kDim; i += kWarp / kTileRows * kEach) {
    const int column = i + part * kEach;
    if (row < count && column < kDim) prefetch(at + column);
  }
}

__device__ __forceinline__ float dot4(const Vec16& a, const Vec16& b, float sum) {
  float x[4], y[4];
  memcpy(x, &a, 16);
  memcpy(y, &b, 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum = fmaf(x[i], y[i], sum);
  return sum;
}

// A tile as the left factor of products with others: as it lies in shared memory, or held in registers, as tensor cores
// take it, for products with many. at(k): columns 16 k to 16 k + 15.
template <class T, int kDim>
struct LeftTile {
  using R = Rows<T, kDim>;
  const unsigned char* tile;

  struct Columns {
    uint32_t at[4];
  };
  __device__ __forceinline__ Columns at(int k) const {
    Columns columns;
    ldmatrix<4>(columns.at, R::move(tile + R::place(lane_index() % 16, lane_index() / 16), 2 * k));
    return columns;
  }
};

template <class T, int kDim, bool kHeld = sizeof(T) == 2>
struct HeldTile {
  typename LeftTile<T, kDim>::Columns columns[kDim / 16];

  __device__ __forceinline__ void hold(const unsigned char* tile) {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) columns[k] = LeftTile<T, kDim>{tile}.at(k);
  }
  __device__ __forceinline__ const typename LeftTile<T, kDim>::Columns& at(int k) const { return columns[k]; }
  __device__ __forceinline__ void negate() {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) columns[k].at[i] ^= 0x80008000u;
    }
  }
};

template <class T, int kDim>
struct HeldTile<T, kDim, false> : LeftTile<T, kDim> {
  __device__ __forceinline__ void hold(const unsigned char* from) { this->tile = from; }
};

// a b^T of two tiles; a is one of the left factors above.
template <class T, int kDim, class Left>
__device__ __forceinline__ Block product_with(const Left& a, const unsigned char* b) {
  using R = Rows<T, kDim>;
  const int lane = lane_index();
  if constexpr (std::is_same_v<T, float>) {
    Block block = {};
#pragma unroll 1
    for (int chunk = 0; chunk < R::kChunks; ++chunk) {
      Vec16 left[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        left[i] = load(reinterpret_cast<const Vec16*>(a.tile + R::place(lane / 4 + 8 * i, chunk)));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = Block::column((i & 1) | (i & 2) * 2);
        const Vec16 right = load(reinterpret_cast<const Vec16*>(b + R::place(column, chunk)));
        float* at = block.at + (i & 1) + (i & 2) * 2;
        at[0] = dot4(left[0], right, at[0]);
        at[2] = dot4(left[1], right, at[2]);
      }
    }
    return block;
  } else {
    float low[4] = {}, high[4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const auto& left = a.at(k);
      uint32_t right[4];
      ldmatrix<4>(right, R::move(b + R::place(lane / 16 * 8 + lane % 8, lane / 8 % 2), 2 * k));
      mma_m16n8k16<T>(low, left.at, {right[0], right[1]});
      mma_m16n8k16<T>(high, left.at, {right[2], right[3]});
    }
    return {{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]}};
  }
}

template <class T, int kDim>
__device__ __forceinline__ Block product(const unsigned char* a, const unsigned char* b) {
  return product_with<T, kDim>(LeftTile<T, kDim>{a}, b);
}

// A block as the left factor of a product.
struct alignas(16) Packed {
  uint32_t at[4];
};

template <class T>
__device__ __forceinline__ Packed packed(const Block& block) {
  const float* x = block.at;
  return {{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])}};
}

// Sixteen columns of a product with a tile, from 8 j on; j is even.
template <class T, int kDim>
__device__ __forceinline__ void add_columns(float (&low)[4], float (&high)[4], const Packed& left,
                                            const unsigned char* tile, int j) {
  const int lane = lane_index();
  uint32_t right[4];
  using R = Rows<T, kDim>;
  ldmatrix<4, true>(right, R::move(tile + R::place(lane % 16, lane / 16), j));
  mma_m16n8k16<T>(low, left.at, {right[0], right[1]});
  mma_m16n8k16<T>(high, left.at, {right[2], right[3]});
}

// wide += block tile.
template <class T, int kDim>
__device__ __forceinline__ void add_product(Wide<kDim>& wide, const Block& block, const unsigned char* tile) {
  if constexpr (std::is_same_v<T, float>) {
    using R = Rows<T, kDim>;
    const int lane = lane_index();
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int from = (lane & ~3) | pair, row = pair * 2 + (i & 1) + (i & 2) * 4;
        const float first = shuffle(block.at[(i & 1) + (i & 2) * 2], from);
        const float second = shuffle(block.at[(i & 1) + (i & 2) * 2 + 2], from);
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) {
          const auto* at = reinterpret_cast<const float*>(tile + R::place(row, 2 * j + lane % 4 / 2)) + lane % 2 * 2;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            wide.sums[j][c] = fmaf(first, at[c], wide.sums[j][c]);
            wide.sums[j][2 + c] = fmaf(second, at[c], wide.sums[j][2 + c]);
          }
        }
      }
    }
  } else {
    const Packed left = packed<T>(block);
#pragma unroll
    for (int j = 0; j < kDim / 8; j += 2) add_columns<T, kDim>(wide.sums[j], wide.sums[j + 1], left, tile, j);
  }
}

// sums += block, of two-byte numbers, times ones: of what products with it add up, the sum of each row, in all its columns.
template <class T>
__device__ __forceinline__ void add_rounded(float (&sums)[4], const Block& block) {
  constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x3f803f80u : 0x3c003c00u;
  mma_m16n8k16<T>(sums, packed<T>(block).at, {kOnes, kOnes});
}

// Writes `count` rows of wide to memory, 16 bytes at a time, by way of a tile of this warp that nobody reads any more.
template <class T, int kDim>
__device__ __forceinline__ void store_wide(const Wide<kDim>& wide, unsigned char* tile, T* to, int64_t stride,
                                           int count) {
  using R = Rows<T, kDim>;
  constexpr bool kFloat = std::is_same_v<T, float>;
  const int lane = lane_index();
  // two numbers of a lane; eight rows further down they lie 8 kBytes further on
  unsigned char* const own =
      tile + R::place(lane / 4, kFloat ? lane % 4 / 2 : 0) + (kFloat ? lane % 2 * 8 : lane % 4 * 4);
  sync_warp();
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = wide.sums[j][2 * i], high = wide.sums[j][2 * i + 1];
      unsigned char* const at = R::move(own, kFloat ? 2 * j : j) + 8 * i * R::kBytes;
      if constexpr (kFloat) {
        reinterpret_cast<float*>(at)[0] = low;
        reinterpret_cast<float*>(at)[1] = high;
      } else {
        *reinterpret_cast<uint32_t*>(at) = pack2<T>(low, high);
      }
    }
  }
  sync_warp();
  constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
  const int row = lane / R::kAcross, chunk = lane % R::kAcross;
  const unsigned char* const from = tile + R::place(row, chunk);
  T* at = to + row * stride + chunk * kWidth;
#pragma unroll
  for (int i = 0; i < kTileRows; i += R::kDown) {
#pragma unroll
    for (int j = 0; row + i < count && j < R::kChunks; j += R::kAcross) {
      store_once(reinterpret_cast<Vec16*>(at + j * kWidth),
                 load(reinterpret_cast<const Vec16*>(R::move_down(from, i) + 16 * j)));
    }
    at += R::kDown * stride;
  }
  sync_warp();
}

}  // namespace pcl
