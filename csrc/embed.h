// embed: item, position and tail-prompt rows of packed histories, added up.
//
//   items         [T]          int32 or int64
//   offsets       [B + 1]      int64
//   table         [V + 1, D]   by row stride
//   position      [max_len, D] by row stride; null for none
//   prompt        [K, P, D]    contiguous; null for none
//   prompt_index  [B]          int64, -1 for none; null: all histories use prompt 0
//   out           [T, D]       table[items[t]] + position[r] + prompt[prompt_index[b], P - 1 - r], r steps before
//                              the end of b; no prompt where r >= P
// Backward: each row of a gradient is the sum over the rows that read it, in their order, taken in double.
// Values are checked here on the CPU, before anything is read through them; shapes, dtypes, strides and device by the
// caller.
#pragma once

#include <cstdint>

#include "isa.h"

namespace pcl {

struct EmbedShape {
  int64_t total, batch, dim, table_rows;
  int64_t max_len;  // -1 without positions
  int64_t num_prompts, prompt_len;
  int64_t table_stride, position_stride, grad_stride;
};

struct EmbedRows {
  const void* items;
  bool wide_items;  // int64
  const int64_t *offsets, *prompt_index;
};

// Both return false where offsets do not run from 0 to total or fall, a history does not fit the positions, a prompt
// number is not in -1..K-1, or (forward, and backward of the table) an id is not in the table. What was written by then
// is of no use.
bool embed_fwd_cpu(const EmbedRows& rows, const void* table, const void* position, const void* prompt, void* out,
                   const EmbedShape& shape, Scalar dtype, Isa isa, int threads);

// grad_out [T, D] by grad_stride; gradients contiguous, null where not asked for.
bool embed_bwd_cpu(const EmbedRows& rows, const void* grad_out, void* grad_table, void* grad_position,
                   void* grad_prompt, const EmbedShape& shape, Scalar dtype, Isa isa, int threads);

// On the device, on a stream; an error number of CUDA's, 0 for none. Nothing is checked: an id that is not in the table
// reads row 0, a history's rows past the positions read the last of them, a prompt number outside 0..K-1 is none.
// Moves items, what the rows read of the tables (at most T rows a table), and T D numbers out.
int embed_fwd_cuda(const EmbedRows& rows, const void* table, const void* position, const void* prompt, void* out,
                   const EmbedShape& shape, Scalar dtype, void* stream);

// What embed_bwd_cuda needs to work in, for the gradients asked for.
int64_t embed_bwd_cuda_bytes(const EmbedShape& shape, bool position, bool prompt, Scalar dtype);

// Gradients of position and prompt. Rows are added in float (double for double) in runs of histories, in their order,
// and the runs in theirs, in double; runs depend on shapes alone: the same bits every time. Rows past the positions are
// in no gradient. Moves T D numbers in.
int embed_bwd_cuda(const EmbedRows& rows, const void* grad_out, void* workspace, void* grad_position, void* grad_prompt,
                   const EmbedShape& shape, Scalar dtype, void* stream);

}  // namespace pcl
