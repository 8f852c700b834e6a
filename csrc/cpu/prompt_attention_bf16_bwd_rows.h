// What backward in bfloat16 reads, made ready for the products of bf16_product.h: a set of query rows, and key rows.
// D and dS are those of ../prompt_attention.h.
#pragma once

#include "prompt_attention_bf16_kernel.h"

namespace pcl {
namespace {

// Which gradients a pass gives.
struct Asked {
  bool query, keys, values;
  bool ds() const { return query || keys; }
};

// A set of query rows, ready for products. Arrays are padded with 0 to `padded` rows.
struct Queries {
  int64_t count, padded;
  uint32_t *query_panels, *grad_panels;  // as columns
  uint32_t *query_pairs, *grad_pairs;    // pairs of rows
  float *largest, *inverse, *dot;        // the stats of the forward pass; D
};

// Keys as rows and, for grad_q, as pairs of rows.
struct KeyRows {
  int64_t count;
  PairRows keys, values;
  uint32_t* key_pairs;
};

template <class E>
KeyRows load_keys(const AttentionRows& keys, const AttentionRows& values, int64_t begin, int64_t count, int64_t head,
                  int64_t dim, bool pairs, Pieces<uint32_t>& pieces) {
  const int64_t wide = round_up(dim, kRowPad), padded = round_up(count, kRowPad);
  KeyRows rows{count, left_rows<E>(keys, begin, count, head, dim, pieces),
               left_rows<E>(values, begin, count, head, dim, pieces), nullptr};
  if (!pairs) return rows;
  rows.key_pairs = pieces.take(padded / 2 * wide);
  uint32_t* scratch = Pieces<uint32_t>(pieces).take(count * wide / 2);
  to_row_pairs(as_pairs(row<Bfloat16>(keys, begin, head), keys.row_stride, count, dim, wide, scratch), count, padded,
               wide, rows.key_pairs);
  return rows;
}

// Row numbers of one set of queries: runs of rows, one after the other.
struct Run {
  int64_t begin, count;
};

// D of 16 rows: the sums of grad_out * out, one a lane.
inline Floats dot_rows(PairRows grad_out, PairRows out, int64_t rows, int64_t pairs) {
  alignas(64) float sums[kLanes * kLanes], turned[kLanes * kLanes];
  for (int64_t r = 0; r < kLanes; ++r) {
    Floats sum{};
    for (int64_t c = 0; r < rows && c < pairs; c += kLanes) {
      sum = dot_pairs(sum, load_pairs(grad_out.data + r * grad_out.stride + c),
                      load_pairs(out.data + r * out.stride + c));
    }
    Wide::store(sums + r * kLanes, sum);
  }
  transpose_block<Wide>(sums, kLanes, kLanes, turned, kLanes);
  Floats total{};
  for (int64_t r = 0; r < kLanes; ++r) total += Wide::load(turned + r * kLanes);
  return total;
}

inline Queries take_queries(int64_t most, int64_t wide, Pieces<uint32_t>& pieces) {
  const auto matrix = [&] { return pieces.take(most * wide / 2); };
  const auto array = [&] { return reinterpret_cast<float*>(pieces.take(most)); };
  return {0, 0, matrix(), matrix(), matrix(), matrix(), array(), array(), array()};
}

// What the forward pass knew of the rows.
inline void load_facts(const AttentionArgs& args, const AttentionGrads& grads, const Run* runs, int64_t num_runs,
                       int64_t head, Queries& to) {
  int64_t at = 0;
  for (int64_t i = 0; i < num_runs; ++i) {
    for (int64_t r = 0; r < runs[i].count; ++r, ++at) {
      const float* stats = static_cast<const float*>(grads.stats) + 2 * ((runs[i].begin + r) * args.num_heads + head);
      to.largest[at] = stats[0];
      to.inverse[at] = stats[1];
    }
  }
  for (; at < to.padded; ++at) to.largest[at] = to.inverse[at] = 0;
}

// Fills the set with the rows of the runs, for the gradients asked for.
inline void load_queries(const AttentionArgs& args, const AttentionGrads& grads, Asked asked, const Run* runs,
                         int64_t num_runs, int64_t head, Queries& to, Pieces<uint32_t> pieces, Ahead<Bfloat16>& ahead) {
  const int64_t dim = args.head_dim, wide = round_up(dim, kRowPad), pairs = wide / 2;
  to.count = 0;
  for (int64_t i = 0; i < num_runs; ++i) to.count += runs[i].count;
  to.padded = round_up(to.count, kRowPad);
  const auto gather = [&](const AttentionRows& from) {
    uint32_t* scratch = pieces.take(to.count * pairs);
    if (num_runs == 1) {
      return as_pairs(row<Bfloat16>(from, runs[0].begin, head), from.row_stride, to.count, dim, wide, scratch);
    }
    uint32_t* next = scratch;
    for (int64_t i = 0; i < num_runs; ++i) {
      copy_pairs(row<Bfloat16>(from, runs[i].begin, head), from.row_stride, runs[i].count, dim, wide, next);
      next += runs[i].count * pairs;
    }
    return PairRows{scratch, pairs};
  };
  const PairRows query = gather(args.q), grad_out = gather(grads.grad_out);
  const PairRows out = asked.ds() ? gather(grads.out) : PairRows{};
  load_facts(args, grads, runs, num_runs, head, to);
  const auto from = [](PairRows rows, int64_t i) { return PairRows{rows.data + i * rows.stride, rows.stride}; };
  for (int64_t i = 0; i < to.count; i += kLanes) {
    const int64_t count = least(kLanes, to.count - i), padded = least(kLanes, to.padded - i);
    ahead.step();
    to_panels(from(query, i), count, pairs, to.query_panels + i * pairs);
    if (asked.keys) to_row_pairs(from(query, i), count, padded, wide, to.query_pairs + i * pairs);
    if (asked.values) to_row_pairs(from(grad_out, i), count, padded, wide, to.grad_pairs + i * pairs);
    if (!asked.ds()) continue;
    to_panels(from(grad_out, i), count, pairs, to.grad_panels + i * pairs);
    Wide::store(to.dot + i, dot_rows(from(grad_out, i), from(out, i), count, pairs));
  }
  const int64_t filled = round_up(to.count, kLanes), rest = (to.padded - filled) * pairs * sizeof(uint32_t);
  for (uint32_t* matrix : {to.query_panels, to.query_pairs, to.grad_panels, to.grad_pairs}) {
    std::memset(matrix + filled * pairs, 0, rest);
  }
  std::memset(to.dot + filled, 0, (to.padded - filled) * sizeof *to.dot);
}

}  // namespace
}  // namespace pcl
