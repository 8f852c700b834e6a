// What one instruction set's copy of prompt_attention offers: the work of one chunk and head. The driver shares tasks
// out.
#pragma once

#include "../prompt_attention.h"

namespace pcl {

constexpr int64_t kPad = 16;        // packed operands are padded to this many elements, the widest vector
constexpr int64_t kQueryRows = 96;  // backward keeps the scores of this many rows; a multiple of every tile's rows

constexpr int64_t kTaskHeads = 8;  // the most heads of one task

// The work of one chunk and the heads head .. head + heads - 1.
struct AttentionTask {
  int64_t chunk, head, heads;
  void* scratch;  // the kernels' fwd_scratch or bwd_scratch elements, 64-byte aligned
};

// Sums of one chunk and head, [p, padded d] each; null where not asked for.
struct PrefixSums {
  void *k, *v;
};

struct AttentionKernels {
  void (*fwd)(const AttentionArgs& args, void* out, void* stats, const AttentionTask& task);
  // sums: one for each head of the task
  void (*bwd)(const AttentionArgs& args, const AttentionGrads& grads, const PrefixSums* sums,
              const AttentionTask& task);
  // Elements of scratch, of the type that sums are taken in, for histories of at most `length` rows that see at most
  // `shared` prefix rows, in chunks of chunk_rows = `chunk`.
  int64_t (*fwd_scratch)(int64_t length, int64_t shared, int64_t dim, int64_t heads);
  int64_t (*bwd_scratch)(int64_t length, int64_t chunk, int64_t shared, int64_t dim, int64_t heads);
};

AttentionKernels attention_kernels_baseline(Scalar dtype);
AttentionKernels attention_kernels_avx2(Scalar dtype);    // float and bfloat16
AttentionKernels attention_kernels_avx512(Scalar dtype);  // float and bfloat16
AttentionKernels attention_kernels_avx512bf16();          // bfloat16, as the next two
AttentionKernels attention_kernels_amx();
AttentionKernels attention_kernels_emulated_tiles();

static constexpr inline int64_t pad_up(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

static constexpr inline int64_t fwd_scratch(int64_t length, int64_t shared, int64_t dim, int64_t heads) {
  const int64_t keys = pad_up(length) + pad_up(shared);
  return (3 * pad_up(length) + 3 * heads * pad_up(shared)) * pad_up(dim) + 8 * keys + 32 * pad_up(dim) + 64 * kPad;
}
static constexpr inline int64_t bwd_scratch(int64_t length, int64_t, int64_t shared, int64_t dim, int64_t heads) {
  const int64_t keys = pad_up(length) + pad_up(shared);
  return (8 * pad_up(length) + 4 * heads * pad_up(shared)) * pad_up(dim) + 2 * kQueryRows * keys +
         8 * kQueryRows * pad_up(dim) + 64 * kPad;
}

}  // namespace pcl
