// What one instruction set's copy of prompt_attention offers: the work of one chunk and head. The driver shares tasks
// out.
#pragma once

#include "../prompt_attention.h"

namespace pcl {

constexpr int64_t kPad = 16;        // packed operands are padded to this many elements, the widest vector
constexpr int64_t kQueryRows = 96;  // backward keeps the scores of this many rows; a multiple of every tile's rows

struct AttentionTask {
  int64_t chunk, head;
  void* scratch;  // fwd_scratch or bwd_scratch elements, 64-byte aligned
};

// Sums of one chunk and head, [p, padded d] each; null where not asked for.
struct PrefixSums {
  void *k, *v;
};

struct AttentionKernels {
  void (*fwd)(const AttentionArgs& args, void* out, void* lse, const AttentionTask& task);
  void (*bwd)(const AttentionArgs& args, const AttentionGrads& grads, PrefixSums sums, const AttentionTask& task);
};

AttentionKernels attention_kernels_baseline(Scalar dtype);
AttentionKernels attention_kernels_avx2(Scalar dtype);    // float and bfloat16
AttentionKernels attention_kernels_avx512(Scalar dtype);  // float and bfloat16

static constexpr inline int64_t pad_up(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Elements of scratch for histories of at most `length` rows that see at most `shared` prefix rows.
static constexpr inline int64_t fwd_scratch(int64_t length, int64_t shared, int64_t dim) {
  const int64_t keys = pad_up(length) + pad_up(shared);
  return 3 * keys * pad_up(dim) + 8 * keys + 32 * pad_up(dim) + 64 * kPad;
}
static constexpr inline int64_t bwd_scratch(int64_t length, int64_t shared, int64_t dim) {
  const int64_t keys = pad_up(length) + pad_up(shared);
  return 6 * keys * pad_up(dim) + 2 * pad_up(length) * pad_up(dim) + 2 * kQueryRows * keys +
         8 * kQueryRows * pad_up(dim) + 64 * kPad;
}

}  // namespace pcl
