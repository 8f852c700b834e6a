// Backward of one chunk and its heads in bfloat16, on an engine of bf16_product.h. See ../prompt_attention.h for what
// is computed. First all rows of the chunk, one after the other, meet the prefix, which does not care whose they are,
// then each history meets itself.
#pragma once

#include "prompt_attention_bf16_bwd_blocks.h"

namespace pcl {
namespace {

constexpr int64_t kSegment = 128;  // rows of a chunk that meet the prefix together

// Elements of 4 bytes for histories of at most `length` rows that see at most `shared` prefix rows, in chunks that
// begin in `chunk` rows.
inline int64_t bf16_bwd_scratch(int64_t length, int64_t chunk, int64_t shared, int64_t dim, int64_t) {
  const int64_t wide = round_up(dim, kRowPad), own = round_up(length, kRowPad), prefix = round_up(shared, kRowPad);
  const int64_t queries = own > kSegment ? own : kSegment;
  const int64_t keys = own > prefix ? own : prefix;
  return (own + chunk) * wide + 4 * queries * wide + 2 * keys * wide + kKeyBlock * (queries + kRowPad) +
         (kKeyBlock / 2 + 3) * (queries + kRowPad) + 64 * kQueryBlock + 64 * kRowPad;
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
