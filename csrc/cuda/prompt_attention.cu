// Forward of prompt_attention: one pass of every query over its keys, the softmax taken as they come.
#include "attention_grads.h"

namespace pcl {

namespace {

constexpr float kLeastScale = 1e-44f, kLeastBase = -3.402823e38f;

// Weights are relative to a score that was the largest when it was taken. For numbers of two bytes it stays that until
// one comes that is so much larger, in powers of 2: sums are seldom scaled anew, and no weight overflows.
constexpr float kSlack = 8;

// Of numbers of two bytes, a score that is farther from 0 than this is rounded before the base is taken from it, as the
// base was: what a multiply-add keeps of it in excess could be more than a weight can be.
constexpr float kFar = 1 << 20;

// stats: the score that a row's weights are relative to, times log2(e), and one over its softmax's denominator.
template <class T, int kDim>
struct Forward {
  static constexpr bool kFloat = sizeof(T) == 4;
  AllHeads<T> rows[1];
  T* out;
  RowStats* stats;
  int num_heads;
  float scale;  // times log2(e); of two-byte numbers its size, and queries have its sign
  bool negative;

  Slot own;
  int head;
  unsigned char* q;
  HeldTile<T, kDim> queries;
  Wide<kDim> sums;
  float base[2], weight[2];  // of rows i / 4 and i / 4 + 8: what weights are relative to; this lane's share of them
  // Of two-byte numbers, the weights as they are multiplied by values: rounded, in 0 and 2. By these sums are divided: the
  // largest weight is seldom 1, and where it is nearly all of the sum its value comes out as it is.
  float rounded[4];

  template <class Memory>
  __device__ __forceinline__ void load(const Slot&, int, const Memory&) const {}

  template <class Memory>
  __device__ __forceinline__ void begin(const Slot& slot, int head_number, const Memory& memory) {
    own = slot;
    head = head_number;
    q = memory.rows(warp_index(), 0);
    queries.hold(q);
    if constexpr (!kFloat) {
      if (negative) queries.negate();
    }
    sums.clear();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      base[r] = kLeastBase;
      weight[r] = rounded[2 * r] = rounded[2 * r + 1] = 0.f;
    }
  }

  // A score as a base is one: of floats it has been multiplied by scale, and rounded.
  __device__ __forceinline__ float scaled(float score) const { return kFloat ? score : rounded_product(score, scale); }
  __device__ __forceinline__ bool is_new_base(int r, float most) const {
    return kFloat ? most > base[r] : most - base[r] > kSlack;
  }

  // New bases for those rows that have one.
  __device__ __forceinline__ void raise(const float (&most)[2]) {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float now = is_new_base(r, most[r]) ? most[r] : base[r];
      factor[r] = exp2_approx(base[r] - now);
      weight[r] *= factor[r];
      rounded[2 * r] *= factor[r];
      rounded[2 * r + 1] *= factor[r];
      base[r] = now;
    }
    sums.scale(factor[0], factor[1]);
  }

  __device__ __forceinline__ void see(const unsigned char* keys, const unsigned char* values, const Seen& seen) {
    Block scores = product_with<T, kDim>(queries, keys);
#pragma unroll
    for (int i = 0; kFloat && i < 8; ++i) scores.at[i] = rounded_product(scores.at[i], scale);
    if (!seen.all()) {
#pragma unroll
      for (int i = 0; i < 8; ++i) scores.at[i] = seen.at(i) ? scores.at[i] : -INFINITY;
    }
    float most[2] = {scores.at[0], scores.at[2]};
#pragma unroll
    for (int i = 1; i < 8; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], scores.at[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) most[r] = scaled(warp_max<4>(most[r]));
    if (ballot(is_new_base(0, most[0]) || is_new_base(1, most[1])) != 0) raise(most);
    if (kFloat || ballot(fmaxf(fabsf(base[0]), fabsf(base[1])) > kFar) != 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) scores.at[i] = scaled(scores.at[i]) - base[i / 2 % 2];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) scores.at[i] = fmaf(scores.at[i], scale, -base[i / 2 % 2]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      scores.at[i] = exp2_approx(scores.at[i]);
      weight[i / 2 % 2] += scores.at[i];
    }
    if constexpr (!kFloat) add_rounded<T>(rounded, scores);
    add_product<T>(sums, scores, values);
  }

  template <class Memory>
  __device__ __forceinline__ void end(const Memory&) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float all = warp_sum<4>(weight[r]);
      inverse[r] = all == 0.f ? 0.f : 1.f / all;
      const int row = lane_index() / 4 + 8 * r;
      if (lane_index() % 4 == 0 && row < own.count()) {
        stats[(own.begin + own.row + row) * num_heads + head] = {base[r], inverse[r]};
      }
      if (!kFloat && all != 0.f) inverse[r] = 1.f / rounded[2 * r];
    }
    sums.scale(inverse[0], inverse[1]);
    const int64_t stride = static_cast<int64_t>(num_heads) * kDim;
    T* to = out + (own.begin + own.row) * stride + head * kDim;
    store_wide<T, kDim>(sums, q, to, stride, own.count());
  }
};

// Blocks on a multiprocessor, as many as registers last for without spilling.
template <class T, int kDim>
constexpr int kBlocks = sizeof(T) == 2 && kDim <= 64 ? 4 : 2;

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, kDim>))
    forward_kernel(Attention<T> attention, int prefix_tiles, T* out, RowStats* stats) {
  Forward<T, kDim> work;
  work.rows[0] = attention.q;
  work.out = out;
  work.stats = stats;
  work.num_heads = attention.num_heads;
  // In float as backward has it; else never 0, times which -infinity, of what is not seen, would be no number. What is no
  // number stays so.
  const float scale = attention.scale * kLog2E, size = fabsf(scale);
  work.scale = sizeof(T) == 4 ? scale : size < kLeastScale ? kLeastScale : size;
  work.negative = scale < 0.f;
  PassMemory<T, kDim, 1> memory{shared_memory()};
  for_groups(
      attention, memory, [&](int head) { pass_over_keys<T, kDim>(attention, memory, head, prefix_tiles, work); },
      [&](int head, int64_t first, int count) {
        prefetch_tile<T, kDim>(attention.q.head(head), first, count);
        prefetch_tile<T, kDim>(attention.k.head(head), first, count);
        prefetch_tile<T, kDim>(attention.v.head(head), first, count);
      });
  clear_rows_of_none<T, kDim>(attention.slots.runs, out, attention.num_heads);
}

template <class T>
int forward(const AttentionArgs& args, void* out, void* stats, void* stream) {
  return with_dim(args.head_dim, [&](auto dim) {
    using Memory = PassMemory<T, dim(), 1>;
    const int prefix_tiles = prefix_tiles_of<Memory>(args), shared_bytes = Memory::bytes(prefix_tiles);
    const auto attention = attention_of<T>(args);
    const auto kernel = forward_kernel<T, dim()>;
    return launch(kernel, blocks_by_head(kernel, shared_bytes, args.num_heads, attention.groups()), kThreads,
                  shared_bytes, stream, attention, prefix_tiles, static_cast<T*>(out), static_cast<RowStats*>(stats));
  });
}

template <class T>
bool fits(int64_t head_dim) {
  const int forward = with_dim(head_dim, [](auto dim) { return PassMemory<T, dim(), 1>::bytes(1); });
  const int most = max_shared_bytes();
  return forward <= most && own_least_shared<T>(head_dim) <= most && prefix_least_shared<T>(head_dim) <= most;
}

}  // namespace

bool prompt_attention_cuda_fits(int64_t head_dim, Scalar dtype) {
  if (!has_kernels(head_dim, dtype)) return false;
  return with_float(dtype, [&](auto number) { return fits<decltype(number)>(head_dim); });
}

int prompt_attention_fwd_cuda(const AttentionArgs& args, void* out, void* stats, Scalar dtype, void* stream) {
  if (!has_kernels(args.head_dim, dtype)) return kInvalidValue;
  if (args.total == 0 || args.num_heads == 0) return 0;
  return with_float(dtype, [&](auto number) { return forward<decltype(number)>(args, out, stats, stream); });
}

}  // namespace pcl
