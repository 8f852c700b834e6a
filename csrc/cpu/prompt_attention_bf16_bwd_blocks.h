// Backward in bfloat16 where a set of queries meets keys, kKeyBlock of them at a time. Scores are taken with keys as
// rows and queries as columns, so that what belongs to a query lies along the lanes and the gradients of keys and
// values are written once; those of queries are added up in float. P and dS are those of ../prompt_attention.h.
#pragma once

#include "prompt_attention_bf16_bwd_rows.h"

namespace pcl {
namespace {

constexpr int64_t kKeyBlock = 96;     // a multiple of every engine's rows
constexpr int64_t kQueryBlock = 128;  // scores of so many queries are at hand at once

// Working memory: P^T and dS^T of a tile of keys as rows of pairs of queries; dS^T of a block of keys as pairs of rows;
// scores of a tile of keys.
struct BlockMemory {
  uint32_t *p, *ds, *ds_pairs;
  int64_t stride;  // of ds_pairs, in pairs; of p and ds in elements
  float *scores, *grad_scores;
  float scale;  // of the scores
};

// Adds to or writes float rows.
struct StoreSums {
  float* to;
  int64_t stride;
  bool add;
  Floats factor;

  void operator()(int64_t row, int64_t panel, Floats sums) const {
    float* at = to + row * stride + panel * kLanes;
    sums *= factor;
    if (add) sums += Wide::load(at);
    Wide::store(at, sums);
  }
};

// Writes rounded rows.
struct StoreRows {
  Bfloat16* to;
  int64_t stride, dim;
  Floats factor;

  void operator()(int64_t row, int64_t panel, Floats sums) const {
    store_narrow(to + row * stride + panel * kLanes, sums * factor, dim - panel * kLanes);
  }
};

// One vector of a pair of key rows: scores to P, grad_out v^T to dS / scale. The queries see the first of the keys from
// lane `first` on, the second from the next; `odd`: there is no second. Lanes past the queries, whose inverse is 0,
// give 0 whatever the keys hold.
template <bool kMasked, bool kDs>
inline __attribute__((always_inline)) void probabilities(const Queries& queries, const BlockMemory& memory, int64_t row,
                                                         int64_t pair_row, int64_t column, int64_t q, int64_t first,
                                                         bool odd) {
  const Floats largest = Wide::load(queries.largest + q), inverse = Wide::load(queries.inverse + q);
  const Floats scale = Wide::fill(memory.scale), per_ln2 = Wide::fill(kLog2E);
  const auto inside = inverse != Floats{};
  Floats ds[2] = {};
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    if (r == 1 && odd) break;
    const int64_t at = (row + r) * kQueryBlock + column, unseen = first + r;
    const auto mask = [&](Floats x) {
      x = inside ? x : Floats{};
      if (!kMasked || unseen <= 0) return x;
      return unseen < kLanes ? (Wide::keep(unseen) ? Floats{} : x) : Floats{};
    };
    Floats score = scale * Wide::load(memory.scores + at);
    Wide::hold(score);  // rounded, as the largest was: their difference is 0 where it is the largest
    const Floats p = mask(exp2_v((score - largest) * per_ln2) * inverse);
    store_halves(reinterpret_cast<uint16_t*>(memory.p) + (row + r) * memory.stride + q, narrow(p));
    if constexpr (kDs) {
      ds[r] = mask(p * (Wide::load(memory.grad_scores + at) - Wide::load(queries.dot + q)));
      store_halves(reinterpret_cast<uint16_t*>(memory.ds) + (row + r) * memory.stride + q, narrow(ds[r]));
    }
  }
  if constexpr (kDs) store_pairs(memory.ds_pairs + pair_row * memory.stride + q, narrow_pairs(ds[0], ds[1]));
}

// The columns of a pair of key rows; the first `masked` of them may not be seen.
template <bool kDs>
void probability_rows(const Queries& queries, const BlockMemory& memory, int64_t row, int64_t pair_row, int64_t columns,
                      int64_t masked, int64_t q, int64_t first, bool odd) {
  int64_t c = 0;
  for (; c < masked; c += kLanes) {
    probabilities<true, kDs>(queries, memory, row, pair_row, c, q + c, first - c, odd);
  }
  if (odd) {
    for (; c < columns; c += kLanes) probabilities<false, kDs>(queries, memory, row, pair_row, c, q + c, 0, true);
  } else {
    for (; c < columns; c += kLanes) probabilities<false, kDs>(queries, memory, row, pair_row, c, q + c, 0, false);
  }
}

// Queries that meet keys: what is the same for all key blocks of a pass.
struct Pass {
  const AttentionArgs& args;
  Asked asked;
  bool causal;
  const Queries& queries;
  const KeyRows& keys;
  const BlockMemory& memory;
  float* grad_query;  // [queries, d padded to 16], added to where `add` says or after the first block
  bool add;
  Ahead<Bfloat16>& ahead;
};

// P^T and dS^T of the keys j .. j + rows - 1 of a block that begins at j0, and the queries from `start` on.
template <class E>
void fill_tile(const Pass& pass, int64_t j0, int64_t j, int64_t rows, int64_t start) {
  const Queries& queries = pass.queries;
  const BlockMemory& memory = pass.memory;
  const int64_t panel = round_up(pass.args.head_dim, kRowPad) / 2 * kLanes;
  const int64_t depth = round_up(pass.args.head_dim, 2 * E::kDepth) / 2;
  const int64_t end = round_up(queries.count, E::kDepth > 1 ? 2 * E::kDepth : kLanes);
  for (int64_t q = start; q < end; q += kQueryBlock) {
    const int64_t columns = least(kQueryBlock, end - q);
    const auto product = [&](PairRows left, const uint32_t* panels, float* to) {
      E::multiply({left.data + j * left.stride, left.stride, 1}, {panels + q / kLanes * panel, kLanes, panel}, depth,
                  rows, columns / kLanes, StoreScores{to, kQueryBlock});
    };
    product(pass.keys.keys, queries.query_panels, memory.scores);
    if (pass.asked.ds()) product(pass.keys.values, queries.grad_panels, memory.grad_scores);
    for (int64_t r = 0; r < rows; r += 2) {
      const int64_t pair_row = (j - j0 + r) / 2, first = j + r - q;  // the second row's last unseen column is `first`
      const int64_t masked = pass.causal && first >= 0 ? least(columns, round_up(first + 1, kLanes)) : 0;
      const auto fill = pass.asked.ds() ? probability_rows<true> : probability_rows<false>;
      fill(queries, memory, r, pair_row, columns, masked, q, first, r + 1 == rows);
    }
  }
}

// grad_query of all queries from the block's keys j0 .. j0 + count - 1.
template <class E>
void add_grad_query(const Pass& pass, int64_t j0, int64_t count, uint32_t* turned) {
  const BlockMemory& memory = pass.memory;
  const int64_t dim = pass.args.head_dim, wide = round_up(dim, kRowPad), stride = round_up(dim, kLanes);
  const Right keys{pass.keys.key_pairs + j0 / 2 * wide, wide, kLanes};
  for (int64_t q = pass.causal ? j0 : 0; q < pass.queries.count; q += E::kRows) {
    const int64_t rows = least(E::kRows, pass.queries.count - q),
                  seen = pass.causal ? least(count, q + rows - j0) : count;
    const int64_t depth = round_up(seen, 2 * E::kDepth) / 2;
    const StoreSums store{pass.grad_query + q * stride, stride, pass.add || j0 > 0, Wide::fill(1.0f)};
    if constexpr (E::kRowPad > 1) {
      const auto* from = reinterpret_cast<const float*>(memory.ds_pairs + q);
      transpose<Wide>(from, memory.stride, depth, E::kRows, reinterpret_cast<float*>(turned), kKeyBlock / 2);
      E::multiply({turned, kKeyBlock / 2, 1}, keys, depth, rows, stride / kLanes, store);
    } else {
      E::multiply({memory.ds_pairs + q, 1, memory.stride}, keys, depth, rows, stride / kLanes, store);
    }
  }
}

// All keys of a pass. to_keys(j) and to_values(j) store the gradients of keys j, j + 1, ...
template <class E, class ToKeys, class ToValues>
void meet(const Pass& pass, ToKeys to_keys, ToValues to_values, uint32_t* turned) {
  const BlockMemory& memory = pass.memory;
  const Queries& queries = pass.queries;
  const int64_t dim = pass.args.head_dim, wide = round_up(dim, kRowPad), panels = round_up(dim, kLanes) / kLanes;
  constexpr int64_t kStep = E::kDepth > 1 ? 2 * E::kDepth : kLanes;
  for (int64_t j0 = 0; j0 < pass.keys.count; j0 += kKeyBlock) {
    const int64_t count = least(kKeyBlock, pass.keys.count - j0);
    for (int64_t j = j0; j < j0 + count; j += E::kRows) {
      const int64_t rows = least(E::kRows, j0 + count - j), start = pass.causal ? j / kStep * kStep : 0;
      pass.ahead.step();
      fill_tile<E>(pass, j0, j, rows, start);
      const int64_t depth = (round_up(queries.count, 2 * E::kDepth) - start) / 2;
      const auto product = [&](const uint32_t* left, const uint32_t* pairs, auto store) {
        E::multiply({left + start / 2, memory.stride / 2, 1}, {pairs + start / 2 * wide, wide, kLanes}, depth, rows,
                    panels, store);
      };
      if (pass.asked.keys) product(memory.ds, queries.query_pairs, to_keys(j));
      if (pass.asked.values) product(memory.p, queries.grad_pairs, to_values(j));
    }
    if (!pass.asked.query) continue;
    // Pairs of keys that only fill up the depth of a product.
    for (int64_t pair = (count + 1) / 2; pair < round_up(count, 2 * E::kDepth) / 2; ++pair) {
      std::memset(memory.ds_pairs + pair * memory.stride, 0, memory.stride * sizeof *memory.ds_pairs);
    }
    add_grad_query<E>(pass, j0, count, turned);
  }
}

}  // namespace
}  // namespace pcl
