// Forward of one chunk and its heads in bfloat16, on an engine of bf16_product.h. See ../prompt_attention.h for what is
// computed.
//
// Keys and values of a head lie packed in one buffer: those of the prefix first, padded to whole panels, packed once
// for all histories of the chunk, then a history's own. A row of scores runs over both.
#pragma once

#include "bf16_product.h"
#include "prompt_attention_kernel.h"

namespace pcl {
namespace {

constexpr int64_t kSoftmaxRows = 4;
constexpr float kLog2E = 1.44269504f;

// Elements of 4 bytes for histories of at most `length` rows that see at most `shared` prefix rows.
inline int64_t bf16_fwd_scratch(int64_t length, int64_t shared, int64_t dim, int64_t heads) {
  const int64_t keys = round_up(length, kRowPad) + round_up(shared, kRowPad), wide = round_up(dim, kRowPad);
  return heads * keys * wide + 2 * keys * wide + 64 * keys + 64 * kRowPad;
}

// The rows of one head from `begin` on, as pairs that an engine can read on the left of a product: in place where
// possible.
template <class E>
PairRows left_rows(const AttentionRows& rows, int64_t begin, int64_t count, int64_t head, int64_t dim,
                   Pieces<uint32_t>& pieces) {
  const int64_t wide = round_up(dim, kRowPad);
  uint32_t* scratch = pieces.take(round_up(count, kRowPad) * wide / 2);
  const Bfloat16* from = row<Bfloat16>(rows, begin, head);
  if constexpr (E::kRowPad > 1) return copy_pairs(from, rows.row_stride, count, dim, wide, scratch);
  return as_pairs(from, rows.row_stride, count, dim, wide, scratch);
}

// Keys and values of a head: `prefix` keys in front, which take `own_begin` columns.
struct PackedKeys {
  int64_t prefix, own_begin;
  uint32_t *key_panels, *value_pairs;
};

// Packs rows as columns column .. column + count - 1, a multiple of 16.
inline void pack_keys(const AttentionRows& keys, const AttentionRows& values, int64_t begin, int64_t count,
                      int64_t head, int64_t dim, int64_t column, const PackedKeys& to, Pieces<uint32_t> pieces) {
  const int64_t wide = round_up(dim, kRowPad);
  uint32_t* scratch = pieces.take(count * wide / 2);
  const auto pairs = [&](const AttentionRows& rows) {
    return as_pairs(row<Bfloat16>(rows, begin, head), rows.row_stride, count, dim, wide, scratch);
  };
  to_panels(pairs(keys), count, wide / 2, to.key_panels + column * wide / 2);
  const int64_t padded = round_up(column + count, kRowPad) - column;
  to_row_pairs(pairs(values), count, padded, wide, to.value_pairs + column / 2 * wide);
}

// Scores at [row, 16 * panel], with room for as many rows as an engine takes at once.
struct StoreScores {
  float* to;
  int64_t stride;

  float* at(int64_t row, int64_t panel) const { return to + row * stride + panel * kLanes; }
  void operator()(int64_t row, int64_t panel, Floats sums) const { Wide::store(at(row, panel), sums); }
};

template <>
constexpr bool kTakesTiles<StoreScores> = true;

// Rows of a result times a factor of their own, rounded.
struct StoreOut {
  Bfloat16* to;
  int64_t stride, dim;
  const float* factors;

  void operator()(int64_t row, int64_t panel, Floats sums) const {
    store_narrow(to + row * stride + panel * kLanes, sums * Wide::fill(factors[row]), dim - panel * kLanes);
  }
};

// The softmax of R neighbouring rows of scores, not yet scaled, up to columns.end, a multiple of 32: weights in
// bfloat16, 0 where nothing is seen, the largest score of each row and the inverse of its weights' sum. The largest has
// weight 1, however large it is. Row r sees `wider` * r own keys more than `columns` say. Scores of what is not seen
// become -inf.
template <int R>
void softmax_pairs(float* scores, uint16_t* weights, int64_t stride, const WeightScale& weigh, const Columns& columns,
                   int64_t wider, float* largest, float* inverse) {
  constexpr int64_t kStep = 2 * kLanes;
  const Floats lowest = Wide::fill(-__builtin_inff());
  Floats high[R], total[R];
  Pairs bits[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    high[r] = lowest;
    total[r] = Floats{};
    bits[r] = Pairs{};
  }
  // Columns c .. c + 15, of which row r sees the first seen + more * r.
  const auto part = [&](int64_t c, int64_t seen, int64_t more) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      float* at = scores + r * stride + c;
      const int64_t count = seen + more * r;
      const Floats x = Wide::keep(count < 0 ? 0 : count) ? Wide::load(at) : lowest;
      Wide::store(at, x);
      high[r] = x > high[r] ? x : high[r];
    }
  };
  const auto whole = [&](int64_t c) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Floats x = Wide::load(scores + r * stride + c);
      high[r] = x > high[r] ? x : high[r];
    }
  };
  const int64_t seen = columns.own_begin + columns.own, last = round_up(seen + wider * (R - 1), kStep);
  int64_t c = 0;
  for (; c + kLanes <= columns.shared; c += kLanes) whole(c);
  if (c < columns.shared) part(c, columns.shared - c, 0);
  for (c = columns.own_begin; c + kLanes <= seen; c += kLanes) whole(c);
  for (; c < last; c += kLanes) part(c, seen - c, wider);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) high[r] = Wide::max(high[r]);
  const Pairs ones = Pairs{} + 0x3f803f80u;
  for (c = 0; c < last; c += kStep) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const float* from = scores + r * stride + c;
      const HalfPairs some = weigh(Wide::load(from) - high[r], Wide::load(from + kLanes) - high[r], bits[r]);
      total[r] = dot_pairs(total[r], reinterpret_cast<Pairs>(some), ones);
      std::memcpy(weights + r * stride + c, &some, sizeof some);
    }
  }
  for (; c < columns.end; c += kStep) {
    for (int r = 0; r < R; ++r) std::memset(weights + r * stride + c, 0, kStep * sizeof *weights);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    largest[r] = high[r][0];
    inverse[r] = WeightScale::is_nan(bits[r]) ? __builtin_nanf("") : 1 / Wide::sum(total[r])[0];
  }
}

template <class E>
void bf16_fwd_history(const AttentionArgs& args, const PackedKeys& keys, const Span& span, int64_t head, Bfloat16* out,
                      float* stats, Pieces<uint32_t> pieces, Ahead<Bfloat16>& ahead) {
  const int64_t length = span.length, asked = length - span.first;
  const int64_t dim = args.head_dim, wide = round_up(dim, kRowPad), out_row = args.num_heads * dim;
  pack_keys(args.k, args.v, span.begin, length, head, dim, keys.own_begin, keys, pieces);
  const PairRows query = left_rows<E>(args.q, span.at, asked, head, dim, pieces);
  const int64_t score_row = round_up(keys.own_begin + length, kRowPad);
  float* scores = reinterpret_cast<float*>(pieces.take(E::kRows * score_row));
  uint32_t* weights = pieces.take(E::kRows * score_row / 2);
  uint16_t* halves = reinterpret_cast<uint16_t*>(weights);
  const float scale = static_cast<float>(args.scale), size = scale < 0 ? -scale : scale;
  const WeightScale weigh(size * kLog2E);
  for (int64_t i = 0; i < asked; i += E::kRows) {
    const int64_t rows = least(E::kRows, asked - i), before = span.first + i;
    const int64_t seen = args.causal ? before + rows : length;
    const int64_t columns = keys.own_begin + seen, depth = round_up(columns, 2 * E::kDepth) / 2;
    E::multiply({query.data + i * query.stride, query.stride, 1}, {keys.key_panels, kLanes, wide / 2 * kLanes},
                round_up(dim, 2 * E::kDepth) / 2, rows, round_up(columns, kLanes) / kLanes,
                StoreScores{scores, score_row});
    for (int64_t c = 0; scale < 0 && c < rows * score_row; ++c) scores[c] = -scores[c];
    float largest[E::kRows], inverse[E::kRows];
    for (int64_t r = 0; r < rows; r += kSoftmaxRows) {
      ahead.step();
      const Columns seen_columns{keys.prefix, args.causal ? before + r + 1 : length, keys.own_begin,
                                 round_up(2 * depth, kRowPad)};
      with_rows<kSoftmaxRows>(rows - r, [&](auto count) {
        softmax_pairs<decltype(count)::value>(scores + r * score_row, halves + r * score_row, score_row, weigh,
                                              seen_columns, args.causal ? 1 : 0, largest + r, inverse + r);
      });
    }
    for (int64_t r = 0; stats && r < rows; ++r) {
      float* row_stats = stats + 2 * ((span.at + i + r) * args.num_heads + head);
      row_stats[0] = largest[r] * size;
      row_stats[1] = inverse[r];
    }
    E::multiply({weights, score_row / 2, 1}, {keys.value_pairs, wide, kLanes}, depth, rows,
                round_up(dim, kLanes) / kLanes,
                StoreOut{out + (span.at + i) * out_row + head * dim, out_row, dim, inverse});
  }
}

template <class E>
void bf16_fwd_task(const AttentionArgs& args, void* out, void* stats, const AttentionTask& task) {
  [[maybe_unused]] const typename E::Session session{};
  const AttentionPlan& plan = args.plan;
  const int64_t dim = args.head_dim, wide = round_up(dim, kRowPad);
  const int64_t first = plan.chunk_begin[task.chunk], last = plan.chunk_begin[task.chunk + 1];
  const int64_t index = plan.prefix_index[plan.members[first]];
  const int64_t prefix_begin = index < 0 ? 0 : plan.prefix_offsets[index];
  const int64_t prefix = index < 0 ? 0 : plan.prefix_offsets[index + 1] - prefix_begin;
  int64_t longest = 0;
  for (int64_t m = first; m < last; ++m) {
    const int64_t length = plan.offsets[plan.members[m] + 1] - plan.offsets[plan.members[m]];
    longest = length > longest ? length : longest;
  }
  Pieces<uint32_t> pieces{static_cast<uint32_t*>(task.scratch)};
  PackedKeys heads[kTaskHeads];
  for (int64_t h = 0; h < task.heads; ++h) {
    const int64_t own_begin = round_up(prefix, kLanes), room = round_up(own_begin + longest, kRowPad);
    heads[h] = {prefix, own_begin, pieces.take(room * wide / 2), pieces.take(room * wide / 2)};
    if (prefix) pack_keys(args.prefix_k, args.prefix_v, prefix_begin, prefix, task.head + h, dim, 0, heads[h], pieces);
  }
  Ahead<Bfloat16> ahead(dim);
  ahead.add(args.k);
  ahead.add(args.v);
  if (!args.newest) {
    ahead.add(args.q);
    ahead.add({out, args.num_heads * dim, dim});
  }
  const auto steps = [](int64_t rows) { return parts(rows, kSoftmaxRows); };
  for_histories(args, task, ahead, steps, [&](const Span& span, int64_t h) {
    bf16_fwd_history<E>(args, heads[h], span, task.head + h, static_cast<Bfloat16*>(out), static_cast<float*>(stats),
                        pieces, ahead);
  });
}

}  // namespace
}  // namespace pcl
