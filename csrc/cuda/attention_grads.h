// What the backward passes of prompt_attention share.
#pragma once

#include "attention_pass.h"
#include "numbers.h"

namespace pcl {

// A row's part of stats.
struct alignas(8) RowStats {
  float top, inverse;
};

// What backward needs to know of a row and head: the score that weights are relative to times log2(e), one over the
// softmax's denominator, and scale * sum(grad_out * out). For numbers of two bytes the denominator is part of top, as a
// logarithm: a multiplication and a register less for every weight, and an error that such numbers do not see.
struct alignas(16) RowNumbers {
  float top, delta, inverse, unused;

  template <class T>
  __device__ __forceinline__ static RowNumbers of(const RowStats& stats, float sum, float scale) {
    const float delta = sum * scale;
    if constexpr (sizeof(T) == 4) return {stats.top, delta, stats.inverse, 0.f};
    // with nothing to attend to there are no weights: 2^(x - infinity)
    return {stats.inverse == 0.f ? INFINITY : stats.top - log2f(stats.inverse), delta, 1.f, 0.f};
  }

  // The gradient of a score; product: of grad_out and a value.
  __device__ __forceinline__ float grad(float weight, float product, float scale) const {
    return weight * fmaf(product, scale, -delta);
  }

  // Of a float, scores are rounded as forward has rounded them.
  template <class T>
  __device__ __forceinline__ float weight(float score, float scale) const {
    if constexpr (sizeof(T) == 4) return exp2_approx(rounded_product(score, scale) - top) * inverse;
    return exp2_approx(fmaf(score, scale, -top));
  }
};

// Whether the numbers of own rows are made where these are loaded, and not before: as long as shared memory has room
// for out too. What that costs in instructions is hidden behind the memory that need not be read twice.
template <class T>
constexpr bool makes_numbers(int64_t dim) {
  return sizeof(T) == 2 && dim <= 64;
}
template <class T, int kDim>
constexpr bool kMakesNumbers = makes_numbers<T>(kDim);

// numbers [T, H]; or null, then they are made of out and stats [T, H, 2] where they are needed. Gradients are null
// where they are not asked for.
template <class T>
struct AttentionBackward {
  Attention<T> attention;
  AllHeads<T> grad_out, out;
  const RowStats* stats;
  const RowNumbers* numbers;
};

template <class T>
struct KeyGrads {
  T *k, *v;
};

// What 16 keys and queries have to do with each other, keys as rows: the softmax's weights, and the gradients of the
// scores. diagonal: the same 16 rows are both, and a key is seen from its own number on.
template <class T, int kDim>
struct KeyBlocks {
  Block weights, grads;

  template <class Keys, class Values>
  __device__ __forceinline__ KeyBlocks(const Keys& keys, const Values& values, const unsigned char* q,
                                       const unsigned char* grad_out, const RowNumbers* numbers, bool diagonal,
                                       float scale)
      : weights(product_with<T, kDim>(keys, q)), grads(product_with<T, kDim>(values, grad_out)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const RowNumbers row = numbers[Block::column(i)];
      weights.at[i] = row.template weight<T>(weights.at[i], scale * kLog2E);
      grads.at[i] = row.grad(weights.at[i], grads.at[i], scale);
    }
    if (!diagonal) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool seen = Block::below(i) <= 0;
      weights.at[i] = seen ? weights.at[i] : 0.f;
      grads.at[i] = seen ? grads.at[i] : 0.f;
    }
  }
};

// Values, which a warp holds beside its keys as long as registers last.
template <class T, int kDim>
using HeldValues = HeldTile<T, kDim, sizeof(T) == 2 && kDim <= 112>;

// Gradients of 16 keys and their values, by a warp.
template <class T, int kDim>
struct KeySums {
  Wide<kDim> k, v;

  __device__ __forceinline__ void clear() {
    k.clear();
    v.clear();
  }

  // Adds what 16 queries give.
  __device__ __forceinline__ void see(const KeyBlocks<T, kDim>& blocks, const unsigned char* q,
                                      const unsigned char* grad_out, const KeyGrads<T>& asked) {
    if (asked.v != nullptr) add_product<T>(v, blocks.weights, grad_out);
    if (asked.k != nullptr) add_product<T>(k, blocks.grads, q);
  }
};

// A warp's 16 rows of one head's numbers, on their way to shared memory. Past the count they are 0, and so are q and
// grad_out: nothing is added for these.
__device__ __forceinline__ void load_numbers(RowNumbers* to, const RowNumbers* numbers, int num_heads, int head,
                                             int64_t first, int count) {
  const int row = lane_index();
  if (row >= kTileRows) return;
  const bool inside = row < count;
  cp_async<16>(to + row, numbers + (inside ? (first + row) * num_heads + head : 0), inside);
}

// The same of what numbers are made of, to where they will be.
__device__ __forceinline__ void load_stats(RowNumbers* to, const RowStats* stats, int num_heads, int head,
                                           int64_t first, int count) {
  const int row = lane_index();
  if (row >= kTileRows) return;
  const bool inside = row < count;
  cp_async<8>(to + row, stats + (inside ? (first + row) * num_heads + head : 0), inside);
}

// sum(grad_out * out) of 16 rows, lane i's of row i % 16: where numbers are always made here, the diagonal of
// grad_out out^T by tensor cores; else added in the order of numbers_kernel, 16 bytes in a row, then every eighth of
// these, then those eight in pairs.
template <class T, int kDim>
__device__ __forceinline__ float sums_of_rows(const unsigned char* grad_out, const unsigned char* out) {
  using R = Rows<T, kDim>;
  const int lane = lane_index(), row = lane % kTileRows, half = lane / kTileRows;
  if constexpr (kMakesNumbers<T, kDim>) {
    const Block block = product<T, kDim>(grad_out, out);
    // lane 4 i + i / 2 has what is i-th and (i + 8)-th on the diagonal
    const int from = lane % 8 * 4 + lane % 8 / 2;
    const bool odd = lane / 4 % 2 != 0;
    const float low = shuffle(odd ? block.at[1] : block.at[0], from);
    const float high = shuffle(odd ? block.at[7] : block.at[6], from);
    return row < 8 ? low : high;
  } else {
    constexpr int kWidth = kNumbers<T, Vec16>;
    const int own = R::place(row, half * 4);
    float part[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      part[i] = 0.f;
#pragma unroll(sizeof(T) == 2 ? 2 : 1)  // a number of rounds that is known; of floats more spill
      for (int round = 0; round < (R::kChunks + 7) / 8; ++round) {
        if (R::kChunks % 8 != 0 && half * 4 + i + 8 * round >= R::kChunks) break;
        float a[kWidth], b[kWidth];
        widen<T>(load(reinterpret_cast<const Vec16*>(R::move(grad_out + own, i + 8 * round))), a);
        widen<T>(load(reinterpret_cast<const Vec16*>(R::move(out + own, i + 8 * round))), b);
#pragma unroll
        for (int n = 0; n < kWidth; ++n) part[i] = fmaf(a[n], b[n], part[i]);
      }
    }
    const float sum = (part[0] + part[1]) + (part[2] + part[3]);
    return sum + shuffle_xor(sum, kTileRows);
  }
}

// The numbers of 16 rows whose grad_out, out and stats have arrived.
template <class T, int kDim>
__device__ __forceinline__ void make_numbers(RowNumbers* to, const unsigned char* grad_out, const unsigned char* out,
                                             float scale) {
  const int lane = lane_index();
  const float sum = sums_of_rows<T, kDim>(grad_out, out);
  if (lane < kTileRows) to[lane] = RowNumbers::of<T>(load(reinterpret_cast<const RowStats*>(to + lane)), sum, scale);
}

// Gradients of own rows: of q, of keys, of values. Where the prefix is short enough for grads_with_own, also those of
// the prefix; partial: own_partial_bytes.
template <class T>
struct OwnGrads {
  T* q;
  KeyGrads<T> own, prefix;
};
template <class T>
bool grads_with_own(const AttentionArgs& args, const OwnGrads<T>& grads);
template <class T>
int64_t own_partial_bytes(const AttentionArgs& args);
template <class T>
int own_least_shared(int64_t head_dim);  // bytes of shared memory
template <class T>
int grad_own_rows(const AttentionArgs& args, const AttentionBackward<T>& backward, const OwnGrads<T>& grads,
                  float* partial, void* stream);

// Gradients of the keys and values of prefixes; partial: prefix_partial_bytes.
template <class T>
int64_t prefix_partial_bytes(const AttentionArgs& args);
template <class T>
int prefix_least_shared(int64_t head_dim);  // bytes of shared memory
template <class T>
int grad_prefix_keys(const AttentionArgs& args, const AttentionBackward<T>& backward, const KeyGrads<T>& grads,
                     const AttentionMembers& members, float* partial, void* stream);

// Adds up partial [the first `slots` slots of prefixes, H, shares, k and v, 16 rows of d as lanes hold them].
template <class T>
int add_prefix_shares(const AttentionArgs& args, const KeyGrads<T>& grads, int64_t slots, const float* partial,
                      int shares, void* stream);

}  // namespace pcl
