// Gradients of a short prefix, added up by the blocks that take the rows as queries: these need not be read once more.
#pragma once

#include "attention_grads.h"

namespace pcl {

// Gradients of the 16 rows of the one prefix there is, and of their values, for the queries of this block. A warp owns
// 16 columns, so that the warps' queries are added in one order, and nothing has to be added up across warps.
template <class T, int kDim>
struct PrefixSums {
  static constexpr bool kFits = sizeof(T) == 2 && kDim <= 16 * kWarps;
  static constexpr int kCount = 2 * kTileRows * kDim;

  float* sums;     // [k and v, kDim / 8, 4, lane] in shared memory
  float* partial;  // [H, shares, ...], where the blocks of a head are the shares; null: not asked for here
  KeyGrads<T> asked;
  float scale;

  __device__ __forceinline__ void clear() const {
    for (int i = thread_index(); i < kCount; i += kThreads) sums[i] = 0.f;
  }

  // This warp's number i of its 8 a lane.
  __device__ __forceinline__ float& own(int which, int i) const {
    return sums[((which * (kDim / 8) + 2 * warp_index()) * 4 + i) * kWarp + lane_index()];
  }

  // What this lane holds of a warp's block, of scores' gradients or of weights.
  template <class Memory>
  __device__ __forceinline__ static Packed& block(const Memory& memory, int which, int warp) {
    static_assert(kWarp * sizeof(Packed) <= Rows<T, kDim>::kTileBytes || !kFits);
    return reinterpret_cast<Packed*>(memory.others(0, which, warp))[lane_index()];
  }

  // The group's queries, which are in shared memory, all threads together. The prefix is where a pass keeps it, one
  // tile. A warp makes the blocks of its own queries, in the place of the rows that the group looked at.
  template <class Memory>
  __device__ __forceinline__ void see_group(const Memory& memory) const {
    const int warp = warp_index();
    if (memory.item(warp).prefix >= 0) {
      const KeyBlocks<T, kDim> blocks(LeftTile<T, kDim>{memory.prefix(1, 0, 0)},
                                      LeftTile<T, kDim>{memory.prefix(1, 1, 0)}, memory.rows(warp, 0),
                                      memory.rows(warp, 1), memory.numbers(0, warp), false, scale);
      block(memory, 0, warp) = packed<T>(blocks.grads);
      block(memory, 1, warp) = packed<T>(blocks.weights);
    }
    sync_threads();
    const int j = 2 * warp;
    if (j >= kDim / 8) return;  // fewer columns than warps
    float k[2][4], v[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      k[i / 4][i % 4] = own(0, i);
      v[i / 4][i % 4] = own(1, i);
    }
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) {
      if (memory.item(w).prefix < 0) continue;
      if (asked.k != nullptr) add_columns<T, kDim>(k[0], k[1], block(memory, 0, w), memory.rows(w, 0), j);
      if (asked.v != nullptr) add_columns<T, kDim>(v[0], v[1], block(memory, 1, w), memory.rows(w, 1), j);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      own(0, i) = k[i / 4][i % 4];
      own(1, i) = v[i / 4][i % 4];
    }
  }

  __device__ __forceinline__ void write() const {
    float* to = partial + (static_cast<int64_t>(block_y()) * grid_x() + block_x()) * kCount;
    for (int i = thread_index(); i < kCount; i += kThreads) to[i] = sums[i];
  }
};

}  // namespace pcl
