// Backward of prompt_attention: what every row needs once, and the order of the passes. Every pass computes the weights
// again and owns what it writes: no sum depends on which block is faster.
#include "attention_grads.h"
#include "numbers.h"

namespace pcl {

namespace {

constexpr int kLanesARow = 8;

// kLanesARow lanes take one row of one head.
template <class T>
__global__ void __launch_bounds__(kThreads)
    numbers_kernel(AllHeads<T> grad_out, AllHeads<T> out, const RowStats* stats, int64_t rows, int num_heads,
                   int chunks, float scale, RowNumbers* numbers) {
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
  if (inside && thread_index() % kLanesARow == 0) numbers[i] = RowNumbers::of<T>(stats[i], sum, scale);
}

template <class T>
int find_numbers(const AttentionArgs& args, const AttentionGrads& grads, RowNumbers* numbers, void* stream) {
  const int64_t rows = args.total * args.num_heads;
  const int chunks = static_cast<int>(args.head_dim * sizeof(T) / 16);
  const auto blocks = static_cast<unsigned>((rows * kLanesARow + kThreads - 1) / kThreads);
  return launch(numbers_kernel<T>, {blocks}, kThreads, 0, stream, heads_of<T>(grads.grad_out), heads_of<T>(grads.out),
                static_cast<const RowStats*>(grads.stats), rows, static_cast<int>(args.num_heads), chunks,
                static_cast<float>(args.scale), numbers);
}

bool asks_prefix(const AttentionGrads& grads) {
  return grads.grad_prefix_k != nullptr || grads.grad_prefix_v != nullptr;
}

bool asks_own(const AttentionGrads& grads) {
  return grads.grad_q != nullptr || grads.grad_k != nullptr || grads.grad_v != nullptr;
}

template <class T>
int64_t numbers_bytes(const AttentionArgs& args) {
  return makes_numbers<T>(args.head_dim) ? 0 : args.total * args.num_heads * static_cast<int64_t>(sizeof(RowNumbers));
}

template <class T>
int backward(const AttentionArgs& args, const AttentionGrads& grads, const AttentionMembers& members, void* workspace,
             void* stream) {
  const KeyGrads<T> prefix{static_cast<T*>(grads.grad_prefix_k), static_cast<T*>(grads.grad_prefix_v)};
  const OwnGrads<T> own{
      static_cast<T*>(grads.grad_q), {static_cast<T*>(grads.grad_k), static_cast<T*>(grads.grad_v)}, prefix};
  const auto* stats = static_cast<const RowStats*>(grads.stats);
  auto* partial = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + numbers_bytes<T>(args));
  AttentionBackward<T> backward{attention_of<T>(args), heads_of<T>(grads.grad_out), heads_of<T>(grads.out), stats,
                                nullptr};
  const bool with_own = asks_prefix(grads) && grads_with_own(args, own);
  int error = 0;
  if (args.total > 0 && asks_own(grads)) {
    if (!makes_numbers<T>(args.head_dim)) {
      auto* numbers = static_cast<RowNumbers*>(workspace);
      backward.numbers = numbers;
      error = find_numbers<T>(args, grads, numbers, stream);
    }
    if (error == 0) error = grad_own_rows<T>(args, backward, own, with_own ? partial : nullptr, stream);
  }
  if (error == 0 && asks_prefix(grads) && !with_own) {
    error = grad_prefix_keys<T>(args, backward, prefix, members, partial, stream);
  }
  return error;
}

}  // namespace

int64_t prompt_attention_bwd_cuda_bytes(const AttentionArgs& args, bool prefix, Scalar dtype) {
  if (args.num_heads == 0 || !has_kernels(args.head_dim, dtype)) return 0;
  return with_float(dtype, [&](auto number) {
    using T = decltype(number);
    const int64_t numbers = numbers_bytes<T>(args);
    if (!prefix) return numbers;
    const int64_t apart = prefix_partial_bytes<T>(args), with_own = own_partial_bytes<T>(args);
    return numbers + (apart > with_own ? apart : with_own);
  });
}

int prompt_attention_bwd_cuda(const AttentionArgs& args, const AttentionGrads& grads, const AttentionMembers& members,
                              void* workspace, Scalar dtype, void* stream) {
  if (!has_kernels(args.head_dim, dtype)) return kInvalidValue;
  if (args.num_heads == 0) return 0;
  return with_float(dtype,
                    [&](auto number) { return backward<decltype(number)>(args, grads, members, workspace, stream); });
}

}  // namespace pcl
