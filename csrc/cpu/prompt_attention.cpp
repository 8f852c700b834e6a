#include "../prompt_attention.h"

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "prompt_attention_tasks.h"
#include "scalar.h"
#include "scratch.h"

namespace pcl {
namespace {

AttentionKernels kernels_of(Scalar dtype, Isa isa) {
  if (dtype == Scalar::kBfloat16) {
    if (isa == Isa::kEmulatedTiles) return attention_kernels_emulated_tiles();
#ifdef PCL_AMX
    if (isa == Isa::kAmx) return attention_kernels_amx();
#endif
#ifdef PCL_AVX512_BF16
    if (isa == Isa::kAvx512Bf16) return attention_kernels_avx512bf16();
#endif
  }
#ifdef PCL_X86
  if (dtype != Scalar::kDouble && has_avx512(isa)) return attention_kernels_avx512(dtype);
  if (dtype != Scalar::kDouble && isa == Isa::kAvx2) return attention_kernels_avx2(dtype);
#endif
  static_cast<void>(isa);
  return attention_kernels_baseline(dtype);
}

int64_t accumulator_bytes(Scalar dtype) { return dtype == Scalar::kDouble ? 8 : 4; }

int64_t longest(const int64_t* offsets, int64_t count) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = offsets[i + 1] - offsets[i] > most ? offsets[i + 1] - offsets[i] : most;
  return most;
}

// How the chunks and heads are shared out. All heads of a chunk are one task where there are chunks enough: their rows
// lie side by side in memory. Results do not depend on it.
struct Sharing {
  int64_t length, shared, heads, groups, tasks;
  int threads;

  Sharing(const AttentionArgs& args, int most_threads)
      : length(longest(args.plan.offsets, args.plan.batch)),
        shared(longest(args.plan.prefix_offsets, args.plan.num_prefixes)) {
    constexpr int64_t kTasksPerThread = 8, kPrefixElements = 1 << 16;
    const int64_t multiply_adds = 2 * args.total * args.num_heads * args.head_dim * (1 + (length + shared) / 2);
    threads = threads_for_products(2 * multiply_adds, most_threads);  // the softmax takes as long as the products
    heads = args.num_heads < kTaskHeads ? args.num_heads : kTaskHeads;
    const bool many = threads == 1 || args.plan.num_chunks >= kTasksPerThread * threads;
    if (!many || heads * shared * args.head_dim > kPrefixElements) heads = 1;
    if (heads == 0) heads = 1;
    groups = (args.num_heads + heads - 1) / heads;
    tasks = args.plan.num_chunks * groups;
  }

  AttentionTask at(const AttentionArgs& args, int64_t task, void* memory) const {
    const int64_t head = task % groups * heads, left = args.num_heads - head;
    return {args.plan.chunk_order[task / groups], head, left < heads ? left : heads, memory};
  }
};

int64_t chunk_prefix(const AttentionPlan& plan, int64_t chunk) {
  return plan.prefix_index[plan.members[plan.chunk_begin[chunk]]];
}

// Room for the prefix sums of every chunk and head, [p, padded d] each, and their way into the gradients.
class Partials {
 public:
  Partials(const AttentionArgs& args, const AttentionGrads& grads, Scalar dtype)
      : args_(args), dtype_(dtype), dim_(pad_up(args.head_dim)), begin_(args.plan.num_chunks + 1, 0) {
    const AttentionPlan& plan = args.plan;
    for (int64_t c = 0; c < plan.num_chunks; ++c) {
      const int64_t r = chunk_prefix(plan, c);
      begin_[c + 1] = begin_[c] + (r < 0 ? 0 : plan.prefix_offsets[r + 1] - plan.prefix_offsets[r]);
    }
    const int64_t bytes = begin_[plan.num_chunks] * args.num_heads * dim_ * accumulator_bytes(dtype);
    if (grads.grad_prefix_k) k_ = allocate(bytes);
    if (grads.grad_prefix_v) v_ = allocate(bytes);
  }

  PrefixSums at(int64_t chunk, int64_t head) const {
    const int64_t rows = begin_[chunk] * args_.num_heads + head * (begin_[chunk + 1] - begin_[chunk]);
    const int64_t byte = rows * dim_ * accumulator_bytes(dtype_);
    const auto piece = [byte](const Memory& memory) {
      return memory ? static_cast<char*>(memory.get()) + byte : nullptr;
    };
    return {piece(k_), piece(v_)};
  }

  // The work of adding up, in multiply-adds of a kernel: these numbers are added one by one, in double.
  int64_t work() const {
    constexpr int64_t kEach = 8;
    const int64_t gradients = (k_ ? 1 : 0) + (v_ ? 1 : 0);
    return kEach * gradients * (begin_.back() + args_.prefix_total) * args_.num_heads * dim_;
  }

  // Adds up the chunks of prefix r, in order, and writes one head of its gradients.
  template <class A, class T>
  void reduce(const AttentionGrads& grads, int64_t r, int64_t head) const {
    if (grads.grad_prefix_k) reduce_one<A>(static_cast<T*>(grads.grad_prefix_k), r, head, &PrefixSums::k);
    if (grads.grad_prefix_v) reduce_one<A>(static_cast<T*>(grads.grad_prefix_v), r, head, &PrefixSums::v);
  }

 private:
  template <class A, class T>
  void reduce_one(T* grad, int64_t r, int64_t head, void* PrefixSums::* which) const;

  const AttentionArgs& args_;
  Scalar dtype_;
  int64_t dim_;
  std::vector<int64_t> begin_;  // prefix rows of the chunks before
  Memory k_, v_;
};

template <class A, class T>
void Partials::reduce_one(T* grad, int64_t r, int64_t head, void* PrefixSums::* which) const {
  const AttentionPlan& plan = args_.plan;
  const int64_t begin = plan.prefix_offsets[r], length = plan.prefix_offsets[r + 1] - begin;
  const int64_t first = plan.prefix_chunk[r], last = plan.prefix_chunk[r + 1];
  std::vector<double> sums(dim_);
  for (int64_t i = 0; i < length; ++i) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const A* more = static_cast<const A*>(at(chunk, head).*which) + i * dim_;
      for (int64_t c = 0; c < dim_; ++c) sums[c] += more[c];
    }
    T* to = grad + ((begin + i) * args_.num_heads + head) * args_.head_dim;
    for (int64_t c = 0; c < args_.head_dim; ++c) narrow(static_cast<A>(sums[c]), to + c);
  }
}

}  // namespace

void prompt_attention_fwd_cpu(const AttentionArgs& args, void* out, void* stats, Scalar dtype, Isa isa, int threads) {
  const Sharing sharing(args, threads);
  const AttentionKernels kernels = kernels_of(dtype, isa);
  const int64_t elements = kernels.fwd_scratch(sharing.length, sharing.shared, args.head_dim, sharing.heads);
  parallel_for(sharing.tasks, sharing.threads, [&](int64_t task) {
    kernels.fwd(args, out, stats, sharing.at(args, task, scratch(elements * accumulator_bytes(dtype))));
  });
}

bool newest_attention_fwd_cpu(AttentionArgs args, void* out, Scalar dtype, Isa isa, int threads) {
  const int64_t *offsets = args.plan.offsets, batch = args.plan.batch;
  std::vector<int64_t> newest(batch);
  int64_t filled = 0;
  for (int64_t b = 0; b < batch; ++b) {
    newest[b] = filled;
    filled += offsets[b + 1] > offsets[b];
  }
  if (filled != args.total) return false;
  args.newest = newest.data();
  prompt_attention_fwd_cpu(args, out, nullptr, dtype, isa, threads);
  return true;
}

void prompt_attention_bwd_cpu(const AttentionArgs& args, const AttentionGrads& grads, Scalar dtype, Isa isa,
                              int threads) {
  const AttentionPlan& plan = args.plan;
  const Sharing sharing(args, threads);
  const AttentionKernels kernels = kernels_of(dtype, isa);
  const Partials partials(args, grads, dtype);
  const int64_t elements =
      kernels.bwd_scratch(sharing.length, chunk_rows(args.total), sharing.shared, args.head_dim, sharing.heads);
  parallel_for(sharing.tasks, sharing.threads, [&](int64_t task) {
    const AttentionTask at = sharing.at(args, task, scratch(elements * accumulator_bytes(dtype)));
    PrefixSums sums[kTaskHeads];
    for (int64_t h = 0; h < at.heads; ++h) sums[h] = partials.at(at.chunk, at.head + h);
    kernels.bwd(args, grads, sums, at);
  });
  if (!grads.grad_prefix_k && !grads.grad_prefix_v) return;
  parallel_for(plan.num_prefixes * args.num_heads, threads_for_bytes(partials.work(), threads), [&](int64_t task) {
    const int64_t r = task / args.num_heads, head = task % args.num_heads;
    switch (dtype) {
      case Scalar::kDouble:
        return partials.reduce<double, double>(grads, r, head);
      case Scalar::kBfloat16:
        return partials.reduce<float, Bfloat16>(grads, r, head);
      default:
        return partials.reduce<float, float>(grads, r, head);
    }
  });
}

}  // namespace pcl
