// The work of one chunk and head, once per instruction set. See ../prompt_attention.h for what is computed.
#pragma once

#include "prompt_attention_tasks.h"
#include "simd.h"

namespace pcl {
namespace {

template <class T>
const T* row(const AttentionRows& rows, int64_t i, int64_t head) {
  return static_cast<const T*>(rows.data) + i * rows.row_stride + head * rows.head_stride;
}

// The keys a history sees lie in two runs of columns, each padded to whole vectors: the prefix, then its own.
struct Columns {
  int64_t shared, own_begin;

  // Calls what(begin, end) for the columns of a row that sees no key: padding, and own keys from own_seen on.
  template <class What>
  void hidden(int64_t own_seen, int64_t width, What what) const {
    what(shared, own_begin);
    what(own_begin + own_seen, width);
  }
};

// The prefix of a chunk, ready for products.
template <class A>
struct Prefix {
  int64_t begin = 0, length = 0, width = 0;
  A *keys_t = nullptr, *values_t = nullptr;  // [d, width]
  Rows<A> keys{}, values{};
};

template <class S, class T>
Prefix<typename S::A> load_prefix(const AttentionArgs& args, const AttentionTask& task, Pieces<typename S::A>& pieces,
                                  bool transpose_values) {
  using A = typename S::A;
  Prefix<A> prefix;
  const AttentionPlan& plan = args.plan;
  const int64_t index = plan.prefix_index[plan.members[plan.chunk_begin[task.chunk]]];
  if (index < 0) return prefix;
  prefix.begin = plan.prefix_offsets[index];
  prefix.length = plan.prefix_offsets[index + 1] - prefix.begin;
  if (prefix.length == 0) return prefix;
  prefix.width = S::round_up(prefix.length);
  const int64_t dim = args.head_dim, wide = S::round_up(dim);
  const T* keys = row<T>(args.prefix_k, prefix.begin, task.head);
  const T* values = row<T>(args.prefix_v, prefix.begin, task.head);
  prefix.keys_t = pieces.take(dim * prefix.width);
  transpose(keys, args.prefix_k.row_stride, prefix.length, dim, prefix.keys_t, prefix.width);
  if (transpose_values) {
    prefix.values_t = pieces.take(dim * prefix.width);
    transpose(values, args.prefix_v.row_stride, prefix.length, dim, prefix.values_t, prefix.width);
  }
  prefix.keys = as_rows<S>(keys, args.prefix_k.row_stride, prefix.length, dim, pieces.take(prefix.length * wide));
  prefix.values = as_rows<S>(values, args.prefix_v.row_stride, prefix.length, dim, pieces.take(prefix.length * wide));
  return prefix;
}

// Turns a row of scores into exp(score - max) and returns what they sum to; hidden columns become 0.
template <class S>
typename S::A softmax_row(typename S::A* scores, int64_t width, Columns columns, int64_t own_seen,
                          typename S::A* most) {
  using A = typename S::A;
  using V = typename S::V;
  columns.hidden(own_seen, width, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) scores[c] = static_cast<A>(-__builtin_inf());
  });
  V high = S::load(scores);
  for (int64_t c = S::kLanes; c < width; c += S::kLanes) {
    const V x = S::load(scores + c);
    high = x > high ? x : high;
  }
  *most = S::max(high);
  const V shift = S::fill(*most);
  V total{};
  for (int64_t c = 0; c < width; c += S::kLanes) {
    const V e = exp_v<S>(S::load(scores + c) - shift);
    S::store(scores + c, e);
    total += e;
  }
  return S::sum(total);
}

inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

template <class S, class T>
void fwd_history(const AttentionArgs& args, const Prefix<typename S::A>& prefix, int64_t begin, int64_t length, T* out,
                 typename S::A* lse, const AttentionTask& task, Pieces<typename S::A> pieces) {
  using A = typename S::A;
  constexpr int R = S::kTileRows;
  const int64_t dim = args.head_dim, wide = S::round_up(dim), out_row = args.num_heads * dim;
  const int64_t own_width = S::round_up(length);
  const Columns columns{prefix.length, prefix.width};
  const T* q = row<T>(args.q, begin, task.head);
  A* keys_t = pieces.take(dim * own_width);
  transpose(row<T>(args.k, begin, task.head), args.k.row_stride, length, dim, keys_t, own_width);
  const Rows<A> values =
      as_rows<S>(row<T>(args.v, begin, task.head), args.v.row_stride, length, dim, pieces.take(length * wide));
  const int64_t score_row = prefix.width + own_width;
  A* scores = pieces.take(R * score_row);
  A *query_scratch = pieces.take(R * wide), *out_scratch = pieces.take(R * wide);
  for (int64_t i = 0; i < length; i += R) {
    const int64_t rows = length - i < R ? length - i : R, seen = args.causal ? i + rows : length;
    const Rows<A> query = as_rows<S>(q + i * args.q.row_stride, args.q.row_stride, rows, dim, query_scratch);
    const Product<A> score{query.stride, 1, score_row, static_cast<A>(args.scale), false};
    const Factor<A> with_prefix{query.data, prefix.keys_t, prefix.width, dim},
        with_own{query.data, keys_t, own_width, dim};
    if (prefix.length) multiply<S>(score, &with_prefix, 1, rows, prefix.width, scores);
    multiply<S>(score, &with_own, 1, rows, S::round_up(seen), scores + prefix.width);
    A inverse[R];
    for (int64_t r = 0; r < rows; ++r) {
      A most;
      const A sum = softmax_row<S>(scores + r * score_row, prefix.width + S::round_up(seen), columns,
                                   args.causal ? i + r + 1 : length, &most);
      inverse[r] = 1 / sum;
      lse[(begin + i + r) * args.num_heads + task.head] = most + log_of(sum);
    }
    const Sink<S, T> sink(out + (begin + i) * out_row + task.head * dim, out_row, rows, dim, out_scratch);
    const Product<A> mix{score_row, 1, sink.stride, 1, false};
    const Factor<A> parts[2] = {{scores, prefix.values.data, prefix.values.stride, prefix.length},
                                {scores + prefix.width, values.data, values.stride, seen}};
    multiply<S>(mix, parts, 2, rows, wide, sink.data);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < dim; ++c) sink.data[r * sink.stride + c] *= inverse[r];
    }
    sink.flush();
  }
}

template <class S, class T>
void fwd_task(const AttentionArgs& args, void* out, void* lse, const AttentionTask& task) {
  using A = typename S::A;
  Pieces<A> pieces{static_cast<A*>(task.scratch)};
  const AttentionPlan& plan = args.plan;
  const Prefix<A> prefix = load_prefix<S, T>(args, task, pieces, false);
  for (int64_t m = plan.chunk_begin[task.chunk]; m < plan.chunk_begin[task.chunk + 1]; ++m) {
    const int64_t b = plan.members[m], begin = plan.offsets[b], length = plan.offsets[b + 1] - begin;
    if (length)
      fwd_history<S, T>(args, prefix, begin, length, static_cast<T*>(out), static_cast<A*>(lse), task, pieces);
  }
}

}  // namespace
}  // namespace pcl
