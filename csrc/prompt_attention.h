// prompt_attention: packed histories attend to shared prefixes and to themselves.
//
//   q, k, v              [T, H, d]   by row and head stride, contiguous in d
//   prefix_k, prefix_v   [M, H, d]   the same; null without a prefix
//   plan                             see attention_plan.h
//   out                  [T, H, d]   row i of history b attends to all of prefix_index[b] and to rows <= i of b
//                                    (all rows of b when not causal): softmax(scale * q k^T) v
//   stats                [T, H, 2]   each row's largest score and one over its softmax's denominator, kept for
//                                    backward; float, double for double; null where nobody asks for them (CPU alone)
// Backward, with P the softmax and D_i = sum(grad_out_i * out_i):
//   grad_v = P^T grad_out,  dS = scale * P * (grad_out v^T - D),  grad_q = dS k,  grad_k = dS^T q
// Sums are taken in float (double for double). A chunk of the plan sums the prefix gradients of its histories, chunks
// are added in the order of their numbers, in double: the same bits whatever the threads. A history's rows are computed
// from that history and its prefix alone, by steps that depend on their lengths alone: the same bits in any company.
// The caller has checked shapes, dtypes, strides and device; the plan was checked when it was made.
#pragma once

#include <cstdint>

#include "attention_plan.h"
#include "isa.h"

namespace pcl {

struct AttentionRows {
  const void* data;
  int64_t row_stride, head_stride;  // in elements
};

struct AttentionArgs {
  AttentionPlan plan;
  AttentionRows q, k, v, prefix_k, prefix_v;
  int64_t total, prefix_total, num_heads, head_dim;
  double scale;
  bool causal;
  const int64_t* newest = nullptr;  // [B] the row of q, out and stats that is a history's newest; null: they hold all
};

struct AttentionGrads {
  AttentionRows grad_out, out;
  const void* stats;
  void *grad_q, *grad_k, *grad_v, *grad_prefix_k, *grad_prefix_v;  // contiguous; null where not asked for
};

// For the prefix gradients on CUDA: the histories [B] in the order of their prefixes, how many runs of 16 rows they have
// up to and with each [B], and the first member of each prefix, then the end of the last's [R + 1].
struct AttentionMembers {
  const int64_t *members, *slots, *begins;
};

void prompt_attention_fwd_cpu(const AttentionArgs& args, void* out, void* stats, Scalar dtype, Isa isa, int threads);
void prompt_attention_bwd_cpu(const AttentionArgs& args, const AttentionGrads& grads, Scalar dtype, Isa isa,
                              int threads);

// newest_attention: the newest row of each of the m histories that are not empty, and no other. args.total is m, and q
// and out are [m, H, d]; their rows have the bits of the same rows among all. False, with nothing done, where m is not
// how many such histories there are.
bool newest_attention_fwd_cpu(AttentionArgs args, void* out, Scalar dtype, Isa isa, int threads);

// On CUDA the offsets, prefixes and indices of the plan are all that is read, unchecked: whatever they hold, nothing
// outside the tensors is touched. Rows before the first history and after the last are 0, and so are their gradients.
// Head widths are multiples of 16 up to 128 that fit; rows and heads lie at multiples of 16 bytes. The
// score in stats is one in base 2, times log2(e), and for numbers of two bytes up to 8 below the largest. Returns CUDA's
// error number.
//
// Bytes moved, E the size of T H d numbers: forward 4 E (q, k, v, out), more where own keys of a history past 64 rows
// are read again, by way of L2. Backward:
//   grad_q, grad_k, grad_v   8 E   q, k, v, out, grad_out in, gradients out. A block takes its rows as queries, then as
//                                  keys: what it reads twice is in L2 then. 6 E and 7 E for queries or keys alone.
//                            9 E   in float and for d > 64: D, of out and grad_out, is made before and kept, 16 bytes a
//                                  row and head
//   a prefix                 0     along with grad_q, for a single one of at most 16 rows and d <= 64, not in float
//                            3 E   otherwise, and alone (q, out, grad_out), 2 E where D is there; blocks of its other
//                                  rows read the same at the same time, by way of L2
//
// Fits: whether the shared memory that a block of each kernel needs at least is there on the current device.
bool prompt_attention_cuda_fits(int64_t head_dim, Scalar dtype);
int prompt_attention_fwd_cuda(const AttentionArgs& args, void* out, void* stats, Scalar dtype, void* stream);

// workspace: as many bytes as the first says, 16-byte aligned; prefix: whether gradients of the prefix are asked for,
// for which there are members, read unchecked as the plan is.
int64_t prompt_attention_bwd_cuda_bytes(const AttentionArgs& args, bool prefix, Scalar dtype);
int prompt_attention_bwd_cuda(const AttentionArgs& args, const AttentionGrads& grads, const AttentionMembers& members,
                              void* workspace, Scalar dtype, void* stream);

}  // namespace pcl
