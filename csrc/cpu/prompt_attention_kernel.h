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

// The keys a row sees lie in two runs of columns, each padded to whole vectors: `shared` of the prefix, then `own`,
// which begin at column own_begin and are written up to column `end`.
struct Columns {
  int64_t shared, own, own_begin, end;

  // Calls step(column, keys seen from it on) for every vector that holds a seen key.
  template <class S, class Step>
  void for_seen(Step step) const {
    for (int64_t c = 0; c < shared; c += S::kLanes) step(c, shared - c);
    for (int64_t c = 0; c < own; c += S::kLanes) step(own_begin + c, own - c);
  }

  // Calls step(column) for the vectors up to `end` that hold none.
  template <class S, class Step>
  void for_unseen(Step step) const {
    for (int64_t c = own_begin + S::round_up(own); c < end; c += S::kLanes) step(c);
  }
};

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Asks for a row of `bytes` bytes; near: into the first cache, not the second.
template <bool kNear>
inline void ask(const void* row, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(row) + i, 0, kNear ? 3 : 2);
}

// Asks for the rows that are needed next while others are worked on. The rows of one history and head lie a whole row
// of all heads apart, where processors do not look ahead by themselves: waiting for them would cost short histories as
// much as the arithmetic.
template <class T>
class Ahead {
 public:
  explicit Ahead(int64_t dim) : row_bytes_(dim * static_cast<int64_t>(sizeof(T))) {}

  void add(const AttentionRows& rows) { rows_[count_++] = rows; }

  // The next step() calls, `steps` of them, ask for these rows of this head, of all tensors in turn.
  void aim(int64_t first, int64_t rows, int64_t head, int64_t steps) {
    for (int64_t t = 0; t < count_; ++t) next_[t] = row<T>(rows_[t], first, head);
    left_ = rows * count_;
    per_step_ = steps > 0 ? parts(left_, steps) : 0;
    tensor_ = 0;
  }

  void step() {
    for (int64_t i = 0; i < per_step_ && left_ > 0; ++i, --left_) {
      ask<false>(next_[tensor_], row_bytes_);
      next_[tensor_] += rows_[tensor_].row_stride;
      tensor_ = tensor_ + 1 < count_ ? tensor_ + 1 : 0;
    }
  }

 private:
  int64_t row_bytes_, count_ = 0, per_step_ = 0, left_ = 0, tensor_ = 0;
  AttentionRows rows_[8];
  const T* next_[8];
};

// A history's rows in as few tiles as hold them, of sizes that differ by at most one: 8 rows are 4 and 4, not 6 and 2.
template <class S>
struct RowTiles {
  int64_t count, size, larger;  // the first `larger` tiles have one row more than size

  explicit RowTiles(int64_t length)
      : count(parts(length, S::kTileRows)), size(length / count), larger(length % count) {}
  int64_t begin(int64_t tile) const { return tile * size + (tile < larger ? tile : larger); }
};

// A history's rows of k and v, and which of them attend: those from `first` on, which lie from row `at` on in q, out and
// stats.
struct Span {
  int64_t begin, length, first, at;
};

inline Span span_of(const AttentionArgs& args, int64_t history) {
  const int64_t begin = args.plan.offsets[history], length = args.plan.offsets[history + 1] - begin;
  return args.newest ? Span{begin, length, length - 1, args.newest[history]} : Span{begin, length, 0, begin};
}

// Calls each(span, head) for the histories and heads of a task, looking ahead to the next in each's steps(rows that
// attend) steps.
template <class T, class Steps, class Each>
void for_histories(const AttentionArgs& args, const AttentionTask& task, Ahead<T>& ahead, Steps steps_of, Each each) {
  const AttentionPlan& plan = args.plan;
  const int64_t last = plan.chunk_begin[task.chunk + 1];
  for (int64_t m = plan.chunk_begin[task.chunk]; m < last; ++m) {
    const Span span = span_of(args, plan.members[m]);
    const int64_t steps = steps_of(span.length - span.first);
    for (int64_t h = 0; h < task.heads && span.length > 0; ++h) {
      if (h + 1 < task.heads) {
        ahead.aim(span.begin, span.length, task.head + h + 1, steps);
      } else if (m + 1 < last) {
        const int64_t next = plan.members[m + 1];
        ahead.aim(plan.offsets[next], plan.offsets[next + 1] - plan.offsets[next], task.head, steps);
      } else {
        ahead.aim(0, 0, 0, 0);
      }
      each(span, h);
    }
  }
}

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
  const auto rows = [&](const AttentionRows& from, bool once) {
    const T* data = row<T>(from, prefix.begin, task.head);
    A* room = pieces.take(prefix.length * wide);
    return once ? as_rows<S>(data, from.row_stride, prefix.length, dim, room)
                : copy_rows<S>(data, from.row_stride, prefix.length, dim, room);
  };
  const auto transposed = [&](Rows<A> from) {
    A* to = pieces.take(wide * prefix.width);
    transpose<S>(from.data, from.stride, prefix.length, wide, to, prefix.width);
    return to;
  };
  prefix.keys = rows(args.prefix_k, !transpose_values);  // then they are transposed, and not read again
  prefix.values = rows(args.prefix_v, false);
  prefix.keys_t = transposed(prefix.keys);
  if (transpose_values) prefix.values_t = transposed(prefix.values);
  return prefix;
}

// Calls run with the number of rows, 1 to kMost, as a constant.
template <int kMost, class Run>
inline void with_rows(int64_t rows, Run run) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return with_rows<kMost - 1>(rows, run);
  }
  run(std::integral_constant<int, kMost>{});
}

constexpr int64_t kPause = 1024;  // columns whose weights are one sum: narrow vectors would add thousands one by one

// The softmax of R rows where their scores are, but for the factor `inverse`, up to column columns.end; 0 where nothing
// is seen. Row r sees `wider` * r own keys more than `columns` say. Rows are taken side by side: the reductions of one
// take longer than the arithmetic of a short one.
template <class S, int R>
inline void softmax_rows(typename S::A* scores, int64_t stride, const Columns& columns, int64_t wider,
                         typename S::A* largest, typename S::A* inverse) {
  using V = typename S::V;
  const V lowest = S::fill(static_cast<typename S::A>(-__builtin_inf()));
  // Calls step(row, column, mask) for every vector that any of the rows sees; mask(x, y) is y in lanes not seen. Calls
  // pause() at the same columns for all.
  const auto for_seen = [&](auto step, auto pause) {
    const auto vectors = [&](int64_t begin, int64_t seen, int64_t more) {
      int64_t c = 0;
      const auto maybe_pause = [&] {
        if (c > 0 && c % kPause == 0) pause();
      };
      for (; c + S::kLanes <= seen; c += S::kLanes) {
        maybe_pause();
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) step(r, begin + c, [](V x, V) { return x; });
      }
      for (; c < seen + more * (R - 1); c += S::kLanes) {
        maybe_pause();
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          step(r, begin + c, [&](V x, V y) { return S::keep(seen - c + r * more) ? x : y; });
        }
      }
    };
    vectors(0, columns.shared, 0);
    vectors(columns.own_begin, columns.own, wider);
  };
  V high[R], total[R], before[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    high[r] = lowest;
    total[r] = before[r] = V{};
  }
  for_seen(
      [&](int r, int64_t c, auto mask) {
        const V x = mask(S::load(scores + r * stride + c), lowest);
        high[r] = x > high[r] ? x : high[r];
      },
      [] {});
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) high[r] = S::max(high[r]);
  for_seen(
      [&](int r, int64_t c, auto mask) {
        typename S::A* at = scores + r * stride + c;
        const V e = mask(exp_v<S>(S::load(at) - high[r]), V{});
        S::store(at, e);
        total[r] += e;
      },
      [&] {
        for (int r = 0; r < R; ++r) {
          before[r] += total[r];
          total[r] = V{};
        }
      });
  for (int64_t c = columns.own_begin + S::round_up(columns.own + wider * (R - 1)); c < columns.end; c += S::kLanes) {
    for (int r = 0; r < R; ++r) S::store(scores + r * stride + c, V{});
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    largest[r] = high[r][0];
    inverse[r] = 1 / S::sum(before[r] + total[r])[0];
  }
}

template <class S, class T>
void fwd_history(const AttentionArgs& args, const Prefix<typename S::A>& prefix, const Span& span, T* out,
                 typename S::A* stats, const AttentionTask& task, Pieces<typename S::A> pieces, Ahead<T>& ahead) {
  using A = typename S::A;
  constexpr int R = S::kTileRows;
  const int64_t dim = args.head_dim, wide = S::round_up(dim), out_row = args.num_heads * dim;
  const int64_t length = span.length, own_width = S::round_up(length);
  const RowTiles<S> tiles(length - span.first);
  const T *q = row<T>(args.q, span.at, task.head), *v = row<T>(args.v, span.begin, task.head);
  const Rows<A> keys =
      as_rows<S>(row<T>(args.k, span.begin, task.head), args.k.row_stride, length, dim, pieces.take(length * wide));
  A* room = pieces.take(length * wide);
  const Rows<A> values = tiles.count == 1 ? as_rows<S>(v, args.v.row_stride, length, dim, room)  // read once
                                          : copy_rows<S>(v, args.v.row_stride, length, dim, room);
  A* keys_t = pieces.take(wide * own_width);
  transpose<S>(keys.data, keys.stride, length, wide, keys_t, own_width);
  const int64_t score_row = prefix.width + own_width;
  A* scores = pieces.take(R * score_row);
  A *query_scratch = pieces.take(R * wide), *out_scratch = pieces.take(R * wide);
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t asked = tiles.begin(tile), rows = tiles.begin(tile + 1) - asked;
    const int64_t i = span.first + asked, seen = args.causal ? i + rows : length;
    const Rows<A> query = as_rows<S>(q + asked * args.q.row_stride, args.q.row_stride, rows, dim, query_scratch);
    ahead.step();
    if (tile + 1 < tiles.count) {  // the queries of a long history have left the second cache since they were asked for
      for (int64_t r = tiles.begin(tile + 1); r < tiles.begin(tile + 2); ++r) {
        ask<true>(q + r * args.q.row_stride, dim * static_cast<int64_t>(sizeof(T)));
      }
    }
    const Product<A> score{query.stride, 1, score_row, static_cast<A>(args.scale), false};
    const Factor<A> with_prefix{query.data, prefix.keys_t, prefix.width, dim},
        with_own{query.data, keys_t, own_width, dim};
    if (prefix.length) multiply<S>(score, &with_prefix, 1, rows, prefix.width, scores);
    ahead.step();
    multiply<S>(score, &with_own, 1, rows, S::round_up(seen), scores + prefix.width);
    ahead.step();
    A largest[R], inverse[R];
    const Columns columns{prefix.length, args.causal ? i + 1 : length, prefix.width, prefix.width + S::round_up(seen)};
    with_rows<R>(rows, [&](auto count) {
      softmax_rows<S, decltype(count)::value>(scores, score_row, columns, args.causal ? 1 : 0, largest, inverse);
    });
    for (int64_t r = 0; stats && r < rows; ++r) {
      A* row_stats = stats + 2 * ((span.at + asked + r) * args.num_heads + task.head);
      row_stats[0] = largest[r];
      row_stats[1] = inverse[r];
    }
    ahead.step();
    const Sink<S, T> sink(out + (span.at + asked) * out_row + task.head * dim, out_row, rows, dim, out_scratch);
    const Product<A> mix{score_row, 1, sink.stride, 1, false, inverse};
    const Factor<A> parts[2] = {{scores, prefix.values.data, prefix.values.stride, prefix.length},
                                {scores + prefix.width, values.data, values.stride, seen}};
    multiply<S>(mix, parts, 2, rows, wide, sink.data);
    sink.flush();
  }
}

template <class S, class T>
void fwd_task(const AttentionArgs& args, void* out, void* stats, const AttentionTask& task) {
  using A = typename S::A;
  Pieces<A> pieces{static_cast<A*>(task.scratch)};
  Prefix<A> prefixes[kTaskHeads];
  for (int64_t h = 0; h < task.heads; ++h) {
    prefixes[h] = load_prefix<S, T>(args, {task.chunk, task.head + h, 1, nullptr}, pieces, false);
  }
  Ahead<T> ahead(args.head_dim);
  ahead.add(args.k);
  ahead.add(args.v);
  if (!args.newest) {
    ahead.add(args.q);
    ahead.add({out, args.num_heads * args.head_dim, args.head_dim});
  }
  const auto steps = [](int64_t rows) { return 4 * parts(rows, S::kTileRows); };
  for_histories(args, task, ahead, steps, [&](const Span& span, int64_t h) {
    const AttentionTask one{task.chunk, task.head + h, 1, nullptr};
    fwd_history<S, T>(args, prefixes[h], span, static_cast<T*>(out), static_cast<A*>(stats), one, pieces, ahead);
  });
}

}  // namespace
}  // namespace pcl
