// Backward of prompt_attention: what every row needs once, the gradient of q, and the order of the passes. Every pass
// computes the weights again and owns what it writes: no sum depends on which block is faster.
#include "attention_grads.h"
#include "isa.h"
#include "numbers.h"

namespace pcl {

namespace {

constexpr int kLanesARow = 8;

// kLanesARow lanes take one row of one head.
template <class T>
__global__ void __launch_bounds__(kThreads)
    numbers_kernel(AllHeads<T> grad_out, AllHeads<T> out, const float* stats, int64_t rows, int num_heads, int chunks,
                   RowNumbers* numbers) {
  constexpr int kWidth = kNumbers<T, Vec16>;
  const int64_t i = (static_cast<int64_t>(block_x()) * kThreads + thread_index()) / kLanesARow;
  const bool inside = i < rows;
  const int64_t row = i / num_heads, head = i % num_heads;
  float sum = 0.f;
  for (int c = thread_index() % kLanesARow; inside && c < chunks; c += kLanesARow) {
    float a[kWidth], b[kWidth];
    const T* left = grad_out.data + row * grad_out.stride + head * grad_out.head_stride;
    const T* right = out.data + row * out.stride + head * out.head_stride;
    widen<T>(load(reinterpret_cast<const Vec16*>(left) + c), a);
    widen<T>(load_once(reinterpret_cast<const Vec16*>(right) + c), b);
#pragma unroll
    for (int n = 0; n < kWidth; ++n) sum = fmaf(a[n], b[n], sum);
  }
  sum = warp_sum<kLanesARow>(sum);
  if (inside && thread_index() % kLanesARow == 0) numbers[i] = {stats[2 * i], stats[2 * i + 1], sum, 0.f};
}

template <class T, int kDim>
struct GradQ {
  AllHeads<T> rows[2];  // q, grad_out
  const RowNumbers* numbers;
  T* grad_q;
  int num_heads;
  float scale;

  Slot own;
  int head;
  unsigned char *q, *grad_out;
  Wide<kDim> sums;
  RowNumbers row[2];

  template <class Memory>
  __device__ __forceinline__ void begin(const Slot& slot, int head_number, const Memory& memory) {
    own = slot;
    head = head_number;
    q = memory.rows(warp_index(), 0);
    grad_out = memory.rows(warp_index(), 1);
    sums.clear();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = lane_index() / 4 + 8 * r;
      row[r] = i < own.count() ? numbers[(own.begin + own.row + i) * num_heads + head] : RowNumbers{};
    }
  }

  __device__ __forceinline__ void see(const unsigned char* keys, const unsigned char* values, int key, int length,
                                      bool causal) {
    const Block scores = product<T, kDim>(q, keys);
    Block grads = product<T, kDim>(grad_out, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = key + Block::column(i);
      const bool seen = column < length && (!causal || column <= own.row + Block::row(i));
      const RowNumbers& numbers_of_row = row[i / 2 % 2];
      const float weight = exp2_approx(scores.at[i] * (scale * kLog2E) - numbers_of_row.top) * numbers_of_row.inverse;
      grads.at[i] = seen ? weight * (grads.at[i] - numbers_of_row.delta) * scale : 0.f;
    }
    add_product<T>(sums, grads, keys);
  }

  __device__ __forceinline__ void end() {
    const int64_t stride = static_cast<int64_t>(num_heads) * kDim;
    T* to = grad_q + (own.begin + own.row) * stride + head * kDim;
    store_wide<T, kDim>(sums, q, to, stride, own.count());
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    grad_q_kernel(AttentionBackward<T> backward, int prefix_tiles, T* grad_q) {
  GradQ<T, kDim> work;
  work.rows[0] = backward.attention.q;
  work.rows[1] = backward.grad_out;
  work.numbers = backward.numbers;
  work.grad_q = grad_q;
  work.num_heads = backward.attention.num_heads;
  work.scale = backward.attention.scale;
  pass_over_keys<T, kDim, PassMemory<T, kDim, 2>>(backward.attention, prefix_tiles, work);
}

template <class T>
int grad_queries(const AttentionArgs& args, const AttentionBackward<T>& backward, void* grad_q, void* stream) {
  return with_dim(args.head_dim, [&](auto dim) {
    using Memory = PassMemory<T, dim(), 2>;
    const int prefix_tiles = prefix_tiles_of<Memory>(args), shared_bytes = Memory::bytes(prefix_tiles);
    const int64_t groups = (backward.attention.slots.count() + kWarps - 1) / kWarps;
    const auto kernel = grad_q_kernel<T, dim()>;
    return launch(kernel, blocks_by_head(kernel, shared_bytes, args.num_heads, groups), kThreads, shared_bytes, stream,
                  backward, prefix_tiles, static_cast<T*>(grad_q));
  });
}

template <class T>
int find_numbers(const AttentionArgs& args, const AttentionGrads& grads, RowNumbers* numbers, void* stream) {
  const int64_t rows = args.total * args.num_heads;
  const int chunks = static_cast<int>(args.head_dim * sizeof(T) / 16);
  const auto blocks = static_cast<unsigned>((rows * kLanesARow + kThreads - 1) / kThreads);
  return launch(numbers_kernel<T>, {blocks}, kThreads, 0, stream, heads_of<T>(grads.grad_out), heads_of<T>(grads.out),
                static_cast<const float*>(grads.stats), rows, static_cast<int>(args.num_heads), chunks, numbers);
}

bool asks_prefix(const AttentionGrads& grads) {
  return grads.grad_prefix_k != nullptr || grads.grad_prefix_v != nullptr;
}

template <class T>
int backward(const AttentionArgs& args, const AttentionGrads& grads, const Members& members, void* workspace,
             void* stream) {
  auto* numbers = static_cast<RowNumbers*>(workspace);
  AttentionBackward<T> backward{attention_of<T>(args), heads_of<T>(grads.grad_out), numbers, nullptr, nullptr};
  int error = args.total == 0 ? 0 : find_numbers<T>(args, grads, numbers, stream);
  if (error == 0 && grads.grad_q != nullptr) error = grad_queries<T>(args, backward, grads.grad_q, stream);
  if (error == 0 && (grads.grad_k != nullptr || grads.grad_v != nullptr)) {
    backward.grad_k = static_cast<T*>(grads.grad_k);
    backward.grad_v = static_cast<T*>(grads.grad_v);
    error = grad_own_keys<T>(args, backward, stream);
  }
  if (error == 0 && asks_prefix(grads)) {
    backward.grad_k = static_cast<T*>(grads.grad_prefix_k);
    backward.grad_v = static_cast<T*>(grads.grad_prefix_v);
    error = grad_prefix_keys<T>(args, backward, members, numbers + args.total * args.num_heads, stream);
  }
  return error;
}

template <class Run>
auto with_float(Scalar dtype, Run run) {
  switch (dtype) {
    case Scalar::kBfloat16:
      return run(bf16{});
    case Scalar::kHalf:
      return run(fp16{});
    default:
      return run(float{});
  }
}

}  // namespace

int64_t prompt_attention_bwd_cuda_bytes(const AttentionArgs& args, bool prefix, Scalar dtype) {
  if (args.num_heads == 0) return 0;
  const int64_t numbers = args.total * args.num_heads * sizeof(RowNumbers);
  if (!prefix) return numbers;
  return numbers + with_float(dtype, [&](auto number) { return prefix_partial_bytes<decltype(number)>(args); });
}

int prompt_attention_bwd_cuda(const AttentionArgs& args, const AttentionGrads& grads, const int64_t* members,
                              const int64_t* member_slots, void* workspace, Scalar dtype, void* stream) {
  if (args.num_heads == 0) return 0;
  return with_float(dtype, [&](auto number) {
    return backward<decltype(number)>(args, grads, {members, member_slots, args.plan.batch}, workspace, stream);
  });
}

}  // namespace pcl
