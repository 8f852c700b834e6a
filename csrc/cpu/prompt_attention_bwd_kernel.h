// Backward of one chunk and head, once per instruction set. See ../prompt_attention.h for what is computed.
//
// A history is taken in blocks of kQueryRows rows. A block's probabilities P and their gradients dS are kept whole,
// then every asked-for gradient is one product with them. Row tiles and key tiles start at multiples of the same
// number, so a key tile that begins at or before a row tile needs no column of it that has not been written.
#pragma once

#include <initializer_list>

#include "prompt_attention_kernel.h"

namespace pcl {
namespace {

// Which columns have to be known, from which gradients were asked for.
struct Wanted {
  bool own, own_ds, shared_ds;

  Wanted(const AttentionGrads& grads, PrefixSums sums)
      : own(grads.grad_q || grads.grad_k || grads.grad_v),
        own_ds(grads.grad_q || grads.grad_k),
        shared_ds(grads.grad_q || sums.k) {}
};

template <class A>
struct History {
  int64_t begin, length, width;  // width: columns of own keys
  A *keys_t, *values_t;
  Rows<A> query, keys, grad_out;
};

// Rows i0 .. i1 - 1 of a history: P and dS, [rows, score_row] each.
template <class A>
struct Block {
  int64_t i0, i1, score_row;
  A *p, *ds;
};

template <class S, class T>
History<typename S::A> load_history(const AttentionArgs& args, const AttentionGrads& grads, const Wanted& wanted,
                                    int64_t begin, int64_t length, const AttentionTask& task,
                                    Pieces<typename S::A>& pieces) {
  using A = typename S::A;
  const int64_t dim = args.head_dim, wide = S::round_up(dim);
  History<A> history{begin, length, wanted.own ? S::round_up(length) : 0, nullptr, nullptr, {}, {}, {}};
  const auto rows = [&](const AttentionRows& from) {
    return copy_rows<S>(row<T>(from, begin, task.head), from.row_stride, length, dim, pieces.take(length * wide));
  };
  const auto transposed = [&](Rows<A> from) {
    A* to = pieces.take(wide * history.width);
    transpose<S>(from.data, from.stride, length, wide, to, history.width);
    return to;
  };
  if (wanted.own) {
    history.keys = rows(args.k);
    history.keys_t = transposed(history.keys);
  }
  if (wanted.own_ds) history.values_t = transposed(rows(args.v));
  const auto in_place = [&](const AttentionRows& from) {
    return as_rows<S>(row<T>(from, begin, task.head), from.row_stride, length, dim, pieces.take(length * wide));
  };
  history.query = wanted.own ? rows(args.q) : in_place(args.q);
  history.grad_out = wanted.own ? rows(grads.grad_out) : in_place(grads.grad_out);
  return history;
}

// What the rows of a block know of themselves.
template <class A>
struct RowFacts {
  A largest, inverse;  // of the forward pass
  A dot;               // D, the sum of grad_out * out
  A scale;
};

// One row: scores to P = exp(score - largest) * inverse, and grad_out v^T in ds to dS = scale * P * (ds - D), the
// latter for columns from ds_begin up to ds_end. Both are 0 where nothing is seen.
template <class S>
inline void probability_row(typename S::A* p, typename S::A* ds, const Columns& columns, int64_t ds_begin,
                            int64_t ds_end, const RowFacts<typename S::A>& facts) {
  using V = typename S::V;
  const V shift = S::fill(facts.largest), inverse = S::fill(facts.inverse);
  const V centre = S::fill(facts.dot), scale = S::fill(facts.scale);
  columns.for_seen<S>([&](int64_t c, int64_t left) {
    V e = inverse * exp_v<S>(S::load(p + c) - shift);
    if (left < S::kLanes) e = S::keep(left) ? e : V{};
    S::store(p + c, e);
    if (c < ds_begin || c >= ds_end) return;
    V gradient = scale * (e * (S::load(ds + c) - centre));
    if (left < S::kLanes) gradient = S::keep(left) ? gradient : V{};
    S::store(ds + c, gradient);
  });
  columns.for_unseen<S>([&](int64_t c) {
    S::store(p + c, V{});
    S::store(ds + c, V{});
  });
}

// The sum of grad_out * out over a row.
template <class S, class T>
inline typename S::A dot_row(const typename S::A* grad_out, const T* out, int64_t dim) {
  using A = typename S::A;
  typename S::V sums{};
  int64_t c = 0;
  if constexpr (sizeof(T) == sizeof(A)) {
    for (; c + S::kLanes <= dim; c += S::kLanes) sums += S::load(grad_out + c) * S::load(out + c);
  }
  A sum = S::sum(sums)[0];
  for (; c < dim; ++c) sum += grad_out[c] * widen(out[c]);
  return sum;
}

// Rows whose scores are taken at once: against a prefix alone, rows are cheap.
template <class S>
int64_t block_step(const Wanted& wanted) {
  return wanted.own ? S::kTileRows : 2 * S::kTileRows;
}

template <class S, class T>
void fill_block(const AttentionArgs& args, const AttentionGrads& grads, const Wanted& wanted,
                const Prefix<typename S::A>& prefix, const History<typename S::A>& history,
                const Block<typename S::A>& block, const AttentionTask& task, Ahead<T>& ahead) {
  using A = typename S::A;
  const int64_t dim = args.head_dim, step = block_step<S>(wanted);
  const A scale = static_cast<A>(args.scale), one = 1;
  for (int64_t i = block.i0; i < block.i1; i += step) {
    const int64_t rows = block.i1 - i < step ? block.i1 - i : step, seen = args.causal ? i + rows : history.length;
    const int64_t own_width = wanted.own ? S::round_up(seen) : 0, width = prefix.width + own_width;
    A *p = block.p + (i - block.i0) * block.score_row, *ds = block.ds + (i - block.i0) * block.score_row;
    const A* query = history.query.data + i * history.query.stride;
    const A* grad_out = history.grad_out.data + i * history.grad_out.stride;
    const auto product = [&](const A* a, int64_t a_row, const A* b, int64_t b_row, int64_t count, A* c, A factor) {
      const Factor<A> pair{a, b, b_row, dim};
      if (count) multiply<S>({a_row, 1, block.score_row, factor, false}, &pair, 1, rows, count, c);
    };
    ahead.step();
    product(query, history.query.stride, prefix.keys_t, prefix.width, prefix.width, p, scale);
    product(query, history.query.stride, history.keys_t, history.width, own_width, p + prefix.width, scale);
    ahead.step();
    const int64_t ds_begin = wanted.shared_ds ? 0 : prefix.width, ds_end = wanted.own_ds ? width : prefix.width;
    if (wanted.shared_ds) {
      product(grad_out, history.grad_out.stride, prefix.values_t, prefix.width, prefix.width, ds, one);
    }
    if (wanted.own_ds) {
      product(grad_out, history.grad_out.stride, history.values_t, history.width, own_width, ds + prefix.width, one);
    }
    ahead.step();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = history.begin + i + r;
      const A* stats = static_cast<const A*>(grads.stats) + 2 * (t * args.num_heads + task.head);
      const A dot = dot_row<S>(grad_out + r * history.grad_out.stride, row<T>(grads.out, t, task.head), dim);
      const int64_t own_seen = !wanted.own ? 0 : args.causal ? i + r + 1 : history.length;
      const Columns columns{prefix.length, own_seen, prefix.width, width};
      probability_row<S>(p + r * block.score_row, ds + r * block.score_row, columns, ds_begin, ds_end,
                         {stats[0], stats[1], dot, scale});
    }
  }
}

// grad_q of the block's rows: dS times the keys they saw.
template <class S, class T>
void add_grad_q(const AttentionArgs& args, const AttentionGrads& grads, const Prefix<typename S::A>& prefix,
                const History<typename S::A>& history, const Block<typename S::A>& block, const AttentionTask& task,
                typename S::A* scratch, Ahead<T>& ahead) {
  using A = typename S::A;
  constexpr int R = S::kTileRows;
  const int64_t dim = args.head_dim, wide = S::round_up(dim), grad_row = args.num_heads * dim;
  for (int64_t i = block.i0; i < block.i1; i += R) {
    const int64_t rows = block.i1 - i < R ? block.i1 - i : R, seen = args.causal ? i + rows : history.length;
    ahead.step();
    const A* ds = block.ds + (i - block.i0) * block.score_row;
    T* to = static_cast<T*>(grads.grad_q) + (history.begin + i) * grad_row + task.head * dim;
    const Sink<S, T> sink(to, grad_row, rows, dim, scratch);
    const Factor<A> parts[2] = {{ds, prefix.keys.data, prefix.keys.stride, prefix.length},
                                {ds + prefix.width, history.keys.data, history.keys.stride, seen}};
    multiply<S>({block.score_row, 1, sink.stride, 1, false}, parts, 2, rows, wide, sink.data);
    sink.flush();
  }
}

// to[key] (+)= sum over the block's rows i that see the key of weight[i, key] * rows[i].
template <class S, class T>
void add_to_keys(bool causal, const History<typename S::A>& history, const Block<typename S::A>& block,
                 const typename S::A* weight, Rows<typename S::A> rows, const Sink<S, T>& to, Ahead<T>& ahead) {
  using A = typename S::A;
  constexpr int R = S::kTileRows;
  const int64_t keys = causal ? block.i1 : history.length, wide = S::round_up(to.dim);
  for (int64_t j = 0; j < keys; j += R) {
    ahead.step();
    const int64_t count = keys - j < R ? keys - j : R, from = causal && j > block.i0 ? j : block.i0;
    const Factor<A> pair{weight + (from - block.i0) * block.score_row + j, rows.data + from * rows.stride, rows.stride,
                         block.i1 - from};
    const bool add = causal ? j < block.i0 : block.i0 > 0;
    multiply<S>({1, block.score_row, to.stride, 1, add}, &pair, 1, count, wide, to.data + j * to.stride);
  }
}

// sums[key] += sum over the block's rows of weight[i, key] * rows[i], for the prefix keys.
template <class S>
void add_to_prefix(const AttentionArgs& args, const Prefix<typename S::A>& prefix, const Block<typename S::A>& block,
                   const typename S::A* weight, Rows<typename S::A> rows, void* sums) {
  using A = typename S::A;
  const int64_t wide = S::round_up(args.head_dim);
  const Factor<A> pair{weight, rows.data + block.i0 * rows.stride, rows.stride, block.i1 - block.i0};
  multiply<S>({1, block.score_row, pad_up(args.head_dim), 1, true}, &pair, 1, prefix.length, wide,
              static_cast<A*>(sums));
}

template <class S, class T>
void bwd_history(const AttentionArgs& args, const AttentionGrads& grads, PrefixSums sums, const Wanted& wanted,
                 const Prefix<typename S::A>& prefix, int64_t begin, int64_t length, const AttentionTask& task,
                 Pieces<typename S::A> pieces, Ahead<T>& ahead) {
  using A = typename S::A;
  const int64_t dim = args.head_dim, wide = S::round_up(dim), grad_row = args.num_heads * dim;
  const History<A> history = load_history<S, T>(args, grads, wanted, begin, length, task, pieces);
  const int64_t score_row = prefix.width + history.width, first = begin * grad_row + task.head * dim;
  const int64_t most_rows = length < kQueryRows ? length : kQueryRows;
  A *p = pieces.take(most_rows * score_row), *ds = pieces.take(most_rows * score_row);
  A* scratch = pieces.take(S::kTileRows * wide);
  const auto sink = [&](void* grad) {
    T* to = grad ? static_cast<T*>(grad) + first : nullptr;
    return Sink<S, T>(to, grad_row, length, dim, pieces.take(length * wide));
  };
  const Sink<S, T> grad_k = sink(grads.grad_k), grad_v = sink(grads.grad_v);
  for (int64_t i0 = 0; i0 < length; i0 += kQueryRows) {
    const Block<A> block{i0, length - i0 < kQueryRows ? length : i0 + kQueryRows, score_row, p, ds};
    fill_block<S, T>(args, grads, wanted, prefix, history, block, task, ahead);
    if (grads.grad_q) add_grad_q<S, T>(args, grads, prefix, history, block, task, scratch, ahead);
    if (grads.grad_k) add_to_keys<S, T>(args.causal, history, block, ds + prefix.width, history.query, grad_k, ahead);
    if (grads.grad_v) add_to_keys<S, T>(args.causal, history, block, p + prefix.width, history.grad_out, grad_v, ahead);
    if (sums.k) add_to_prefix<S>(args, prefix, block, ds, history.query, sums.k);
    if (sums.v) add_to_prefix<S>(args, prefix, block, p, history.grad_out, sums.v);
  }
  if (grads.grad_k) grad_k.flush();
  if (grads.grad_v) grad_v.flush();
}

template <class S, class T>
void bwd_task(const AttentionArgs& args, const AttentionGrads& grads, const PrefixSums* sums,
              const AttentionTask& task) {
  using A = typename S::A;
  Pieces<A> pieces{static_cast<A*>(task.scratch)};
  Prefix<A> prefixes[kTaskHeads];
  const Wanted wanted(grads, sums[0]);
  for (int64_t h = 0; h < task.heads; ++h) {
    prefixes[h] = load_prefix<S, T>(args, {task.chunk, task.head + h, 1, nullptr}, pieces, wanted.shared_ds);
    const int64_t sum_bytes = prefixes[h].length * pad_up(args.head_dim) * static_cast<int64_t>(sizeof(A));
    if (sums[h].k) std::memset(sums[h].k, 0, sum_bytes);
    if (sums[h].v) std::memset(sums[h].v, 0, sum_bytes);
  }
  if (!wanted.own && prefixes[0].length == 0) return;
  Ahead<T> ahead(args.head_dim);
  ahead.add(args.q);
  ahead.add(grads.grad_out);
  ahead.add(grads.out);
  if (wanted.own) ahead.add(args.k);
  if (wanted.own_ds) ahead.add(args.v);
  for (void* grad : {grads.grad_q, grads.grad_k, grads.grad_v}) {
    if (grad) ahead.add({grad, args.num_heads * args.head_dim, args.head_dim});
  }
  const int64_t products = (grads.grad_q != nullptr) + (grads.grad_k != nullptr) + (grads.grad_v != nullptr);
  const auto steps = [&](int64_t length) {
    return 3 * parts(length, block_step<S>(wanted)) + products * parts(length, S::kTileRows);
  };
  for_histories(args, task, ahead, steps, [&](const Span& span, int64_t h) {
    const AttentionTask one{task.chunk, task.head + h, 1, nullptr};
    bwd_history<S, T>(args, grads, sums[h], wanted, prefixes[h], span.begin, span.length, one, pieces, ahead);
  });
}

template <class S, class T>
AttentionKernels kernels_of() {
  return {fwd_task<S, T>, bwd_task<S, T>, fwd_scratch, bwd_scratch};
}

}  // namespace
}  // namespace pcl
