// What the backward passes of prompt_attention share.
#pragma once

#include "attention_pass.h"

namespace pcl {

// What backward needs to know of a row and head: the largest score times log2(e), one over the softmax's denominator,
// and sum(grad_out * out). All zero: a row that does not count.
struct alignas(16) RowNumbers {
  float top, inverse, delta, unused;
};

// numbers [T, H].
template <class T>
struct AttentionBackward {
  Attention<T> attention;
  AllHeads<T> grad_out;
  const RowNumbers* numbers;
  T *grad_k, *grad_v;  // of own rows or of prefixes; null where not asked for
};

// Gradients of 16 keys and their values, by a warp.
template <class T, int kDim>
struct KeySums {
  Wide<kDim> k, v;

  __device__ __forceinline__ void clear() {
    k.clear();
    v.clear();
  }

  // Adds what the 16 queries give; diagonal: number of the first query less that of the first key, a key is seen from
  // its own number on.
  __device__ __forceinline__ void see(const unsigned char* keys, const unsigned char* values, const unsigned char* q,
                                      const unsigned char* grad_out, const RowNumbers* numbers, int diagonal,
                                      const AttentionBackward<T>& backward) {
    Block weights = product<T, kDim>(keys, q);
    Block grads = product<T, kDim>(values, grad_out);
    const float scale = backward.attention.scale;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const RowNumbers row = numbers[Block::column(i)];
      const bool seen = Block::row(i) <= Block::column(i) + diagonal;
      const float weight = exp2_approx(weights.at[i] * (scale * kLog2E) - row.top) * row.inverse;
      weights.at[i] = seen ? weight : 0.f;
      grads.at[i] = seen ? weight * (grads.at[i] - row.delta) * scale : 0.f;
    }
    if (backward.grad_v != nullptr) add_product<T>(v, weights, grad_out);
    if (backward.grad_k != nullptr) add_product<T>(k, grads, q);
  }
};

// Sees all: a diagonal that no row is past.
inline constexpr int kNoDiagonal = 1 << 30;

// A warp's 16 rows of one head's numbers, on their way to shared memory.
__device__ __forceinline__ void load_numbers(RowNumbers* to, const RowNumbers* numbers, int num_heads, int head,
                                             int64_t first, int count) {
  const int row = lane_index();
  if (row >= kTileRows) return;
  const bool inside = row < count;
  cp_async<16>(to + row, numbers + (inside ? (first + row) * num_heads + head : 0), inside);
}

// Gradients of the keys and values of own rows.
template <class T>
int grad_own_keys(const AttentionArgs& args, const AttentionBackward<T>& backward, void* stream);

// The same of prefixes: the histories in the order of their prefixes, how many slots of rows they have up to and with
// each; partial: prefix_partial_bytes.
struct Members {
  const int64_t *members, *slots;
  int64_t count;
};
template <class T>
int64_t prefix_partial_bytes(const AttentionArgs& args);
template <class T>
int grad_prefix_keys(const AttentionArgs& args, const AttentionBackward<T>& backward, const Members& members,
                     void* partial, void* stream);

}  // namespace pcl
