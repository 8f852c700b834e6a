// Backward of one chunk and its heads in bfloat16, on an engine of bf16_product.h. See ../prompt_attention.h for what
// is computed.
//
// Scores are taken with keys as rows and queries as columns, kKeyBlock keys at a time, so that what belongs to a query
// lies along the lanes and the gradients of keys and values are written once; those of queries are added up in float.
// First all rows of the chunk, one after the other, meet the prefix, which does not care whose they are, then each
// history meets itself.
#pragma once

#include "prompt_attention_bf16_kernel.h"

namespace pcl {
namespace {

constexpr int64_t kKeyBlock = 96;     // a multiple of every engine's rows
constexpr int64_t kQueryBlock = 128;  // scores of so many queries are at hand at once
constexpr int64_t kSegment = 128;     // rows of a chunk that meet the prefix together

// Elements of 4 bytes for histories of at most `length` rows that see at most `shared` prefix rows, in chunks that
// begin in `chunk` rows.
inline int64_t bf16_bwd_scratch(int64_t length, int64_t chunk, int64_t shared, int64_t dim, int64_t) {
  const int64_t wide = round_up(dim, kRowPad), own = round_up(length, kRowPad), prefix = round_up(shared, kRowPad);
  const int64_t queries = own > kSegment ? own : kSegment;
  const int64_t keys = own > prefix ? own : prefix;
  return (own + chunk) * wide + 4 * queries * wide + 2 * keys * wide + kKeyBlock * (queries + kRowPad) +
         (kKeyBlock / 2 + 3) * (queries + kRowPad) + 64 * kQueryBlock + 64 * kRowPad;
}

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
  float *largest, *inverse, *dot;        // of the forward pass; D
};

// Keys as rows and, for grad_q, as pairs of rows.
struct KeyRows {
  int64_t count;
  PairRows keys, values;
  uint32_t* key_pairs;
};

// Working memory: P^T and dS^T of a tile of keys as rows of pairs of queries; dS^T of a block of keys as pairs of rows;
// scores of a tile of keys.
struct BlockMemory {
  uint32_t *p, *ds, *ds_pairs;
  int64_t stride;  // of ds_pairs, in pairs; of p and ds in elements
  float *scores, *grad_scores;
  float scale;  // of the scores
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

// The work of one head of a chunk.
template <class E>
class Bf16Backward {
 public:
  // `next`: the next head is worked on after this one.
  Bf16Backward(const AttentionArgs& args, const AttentionGrads& grads, PrefixSums sums, int64_t chunk, int64_t head,
               bool next, void* scratch)
      : args_(args),
        grads_(grads),
        sums_(sums),
        head_(head),
        next_(next),
        pieces_{static_cast<uint32_t*>(scratch)},
        shared_ahead_(args.head_dim),
        own_ahead_(args.head_dim) {
    const AttentionPlan& plan = args.plan;
    first_ = plan.chunk_begin[chunk];
    last_ = plan.chunk_begin[chunk + 1];
    const int64_t index = plan.prefix_index[plan.members[first_]];
    if (index >= 0) prefix_ = {plan.prefix_offsets[index], plan.prefix_offsets[index + 1] - plan.prefix_offsets[index]};
    int64_t longest = 0;
    for (int64_t m = first_; m < last_; ++m) {
      const int64_t length = history(m).count;
      rows_ += length;
      longest = length > longest ? length : longest;
    }
    take_memory(round_up(longest > kSegment ? longest : kSegment, kRowPad));
  }

  void run() {
    const Asked shared{grads_.grad_q != nullptr, sums_.k != nullptr, sums_.v != nullptr};
    const Asked own{grads_.grad_q != nullptr, grads_.grad_k != nullptr, grads_.grad_v != nullptr};
    const bool with_prefix = prefix_.count > 0 && (shared.ds() || shared.values);
    const bool with_own = own.ds() || own.values;
    look_ahead(with_prefix, with_own, own);
    if (with_prefix) meet_prefix(shared, with_own);
    if (!with_own) return;
    int64_t at = 0;
    for (int64_t m = first_; m < last_; ++m) {
      const Run rows = history(m);
      if (rows.count == 0) continue;
      const int64_t steps = rows.count / kLanes + rows.count / E::kRows + 2;
      if (m + 1 < last_) {
        own_ahead_.aim(history(m + 1).begin, history(m + 1).count, head_, steps);
      } else {
        own_ahead_.aim(0, 0, 0, 0);
      }
      meet_itself(own, rows, grad_query_ + at * sum_row(), with_prefix);
      at += rows.count;
    }
  }

 private:
  void take_memory(int64_t most) {
    memory_.stride = most + kLanes;
    memory_.scale = static_cast<float>(args_.scale);
    memory_.p = pieces_.take(E::kRows * memory_.stride / 2);
    memory_.ds = pieces_.take(E::kRows * memory_.stride / 2);
    memory_.ds_pairs = pieces_.take(kKeyBlock / 2 * memory_.stride);
    memory_.scores = reinterpret_cast<float*>(pieces_.take(E::kRows * kQueryBlock));
    memory_.grad_scores = reinterpret_cast<float*>(pieces_.take(E::kRows * kQueryBlock));
    turned_ = pieces_.take(E::kRows * kKeyBlock / 2);
    queries_ = take_queries(most, round_up(args_.head_dim, kRowPad), pieces_);
    grad_query_ = reinterpret_cast<float*>(pieces_.take(grads_.grad_q ? rows_ * sum_row() : 0));
  }

  // What is asked for while other rows are worked on.
  void look_ahead(bool with_prefix, bool with_own, Asked own) {
    Ahead<Bfloat16>& queries = with_prefix ? shared_ahead_ : own_ahead_;
    queries.add(args_.q);
    queries.add(grads_.grad_out);
    queries.add(grads_.out);
    if (!with_own) return;
    own_ahead_.add(args_.k);
    if (own.ds()) own_ahead_.add(args_.v);
    for (void* grad : {grads_.grad_q, grads_.grad_k, grads_.grad_v}) {
      if (grad) own_ahead_.add({grad, args_.num_heads * args_.head_dim, args_.head_dim});
    }
  }

  int64_t sum_row() const { return pad_up(args_.head_dim); }

  Run history(int64_t m) const {
    const int64_t b = args_.plan.members[m], begin = args_.plan.offsets[b];
    return {begin, args_.plan.offsets[b + 1] - begin};
  }

  void meet_prefix(Asked asked, bool with_own) {
    Pieces<uint32_t> pieces = pieces_;
    const KeyRows keys = load_keys<E>(args_.prefix_k, args_.prefix_v, prefix_.begin, prefix_.count, head_,
                                      args_.head_dim, asked.query, pieces);
    Run runs[kSegment];
    int64_t num_runs = 0, waiting = 0, done = 0;
    const auto meet_segment = [&] {
      const int64_t steps = waiting / kLanes + prefix_.count / E::kRows + 2, left = rows_ - done - waiting;
      const bool last = left == 0;
      Ahead<Bfloat16>& ahead = last && with_own ? own_ahead_ : shared_ahead_;
      if (!last) {
        ahead.aim(runs[num_runs - 1].begin + runs[num_runs - 1].count, least(left, kSegment), head_, steps);
      } else if (with_own) {
        ahead.aim(history(first_).begin, history(first_).count, head_, steps);
      } else {
        ahead.aim(history(first_).begin, next_ ? least(rows_, kSegment) : 0, head_ + 1, steps);
      }
      load_queries(args_, grads_, asked, runs, num_runs, head_, queries_, pieces, ahead);
      const Pass pass{args_, asked, false, queries_, keys, memory_, grad_query_ + done * sum_row(), false, ahead};
      const auto store = [&](void* sums, double factor) {
        return [=](int64_t j) {
          return StoreSums{static_cast<float*>(sums) + j * sum_row(), sum_row(), true,
                           Wide::fill(static_cast<float>(factor))};
        };
      };
      meet<E>(pass, store(sums_.k, args_.scale), store(sums_.v, 1), turned_);
      done += waiting;
      num_runs = waiting = 0;
    };
    for (int64_t m = first_; m < last_; ++m) {
      for (Run left = history(m); left.count > 0;) {
        const int64_t count = least(left.count, kSegment - waiting);
        runs[num_runs++] = {left.begin, count};
        left = {left.begin + count, left.count - count};
        waiting += count;
        if (waiting == kSegment) meet_segment();
      }
    }
    if (waiting) meet_segment();
  }

  void meet_itself(Asked asked, Run rows, float* grad_query, bool add) {
    const int64_t dim = args_.head_dim, grad_row = args_.num_heads * dim, first = rows.begin * grad_row + head_ * dim;
    Pieces<uint32_t> pieces = pieces_;
    const KeyRows keys = load_keys<E>(args_.k, args_.v, rows.begin, rows.count, head_, dim, asked.query, pieces);
    load_queries(args_, grads_, asked, &rows, 1, head_, queries_, pieces, own_ahead_);
    const Pass pass{args_, asked, args_.causal, queries_, keys, memory_, grad_query, add, own_ahead_};
    const auto store = [&](void* grad, double factor) {
      return [=](int64_t j) {
        return StoreRows{static_cast<Bfloat16*>(grad) + first + j * grad_row, grad_row, dim,
                         Wide::fill(static_cast<float>(factor))};
      };
    };
    meet<E>(pass, store(grads_.grad_k, args_.scale), store(grads_.grad_v, 1), turned_);
    if (!asked.query) return;
    const StoreRows out = store(grads_.grad_q, args_.scale)(0);
    for (int64_t i = 0; i < rows.count; ++i) {
      for (int64_t c = 0; c < sum_row(); c += kLanes) out(i, c / kLanes, Wide::load(grad_query + i * sum_row() + c));
    }
  }

  const AttentionArgs& args_;
  const AttentionGrads& grads_;
  PrefixSums sums_;
  int64_t head_, first_, last_, rows_ = 0;
  bool next_;
  Run prefix_{0, 0};
  Pieces<uint32_t> pieces_;
  BlockMemory memory_;
  uint32_t* turned_;
  Queries queries_;
  float* grad_query_;
  Ahead<Bfloat16> shared_ahead_, own_ahead_;
};

template <class E>
void bf16_bwd_task(const AttentionArgs& args, const AttentionGrads& grads, const PrefixSums* sums,
                   const AttentionTask& task) {
  [[maybe_unused]] const typename E::Session session{};
  for (int64_t h = 0; h < task.heads; ++h) {
    const int64_t index = args.plan.prefix_index[args.plan.members[args.plan.chunk_begin[task.chunk]]];
    const int64_t rows = index < 0 ? 0 : args.plan.prefix_offsets[index + 1] - args.plan.prefix_offsets[index];
    for (void* sum : {sums[h].k, sums[h].v}) {
      if (sum) std::memset(sum, 0, rows * pad_up(args.head_dim) * sizeof(float));
    }
    Bf16Backward<E>(args, grads, sums[h], task.chunk, task.head + h, h + 1 < task.heads, task.scratch).run();
  }
}

template <class E>
AttentionKernels bf16_kernels() {
  return {bf16_fwd_task<E>, bf16_bwd_task<E>, bf16_fwd_scratch, bf16_bwd_scratch};
}

}  // namespace
}  // namespace pcl
