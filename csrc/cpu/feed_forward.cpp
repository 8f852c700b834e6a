#include "../feed_forward.h"

#include "../parallel.h"
#include "feed_forward_tasks.h"
#include "scratch.h"

namespace pcl {
namespace {

FeedForwardKernels kernels_of(Scalar dtype, Scalar weight, Isa isa) {
  if (weight == Scalar::kBfloat16) {
#ifdef PCL_AMX
    if (isa == Isa::kAmx) return feed_forward_kernels_amx();
#endif
#ifdef PCL_AVX512_BF16
    if (isa == Isa::kAvx512Bf16) return feed_forward_kernels_avx512bf16();
#endif
    return feed_forward_kernels_emulated_tiles();
  }
#ifdef PCL_X86
  if (dtype != Scalar::kDouble && has_avx512(isa)) return feed_forward_kernels_avx512();
  if (dtype != Scalar::kDouble && isa == Isa::kAvx2) return feed_forward_kernels_avx2();
#endif
  static_cast<void>(isa);
  return feed_forward_kernels_baseline(dtype == Scalar::kDouble);
}

template <class Body>
void for_blocks(const FeedForwardArgs& args, int64_t block_rows, int threads, Body body) {
  const int64_t bytes = (args.x.dtype == Scalar::kDouble ? 8 : 4) * feed_forward_scratch(args.dim);
  threads = threads_for_products(2 * args.rows * args.dim * args.hidden, threads);
  parallel_runs(args.rows, block_rows, kRowStep, threads,
                [&](int64_t first, int64_t rows) { body(Block{first, rows}, scratch(bytes)); });
}

}  // namespace

void feed_forward_fwd_cpu(const FeedForwardArgs& args, void* out, Isa isa, int threads) {
  const FeedForwardKernels kernels = kernels_of(args.x.dtype, args.weight_in.dtype, isa);
  for_blocks(args, kernels.block_rows, threads,
             [&](Block block, void* memory) { kernels.fwd(args, out, block, memory); });
}

void feed_forward_bwd_cpu(const FeedForwardArgs& args, const Matrix& grad_out, void* grad_x, Isa isa, int threads) {
  const FeedForwardKernels kernels = kernels_of(args.x.dtype, args.weight_in.dtype, isa);
  for_blocks(args, kernels.block_rows, threads,
             [&](Block block, void* memory) { kernels.bwd(args, grad_out, grad_x, block, memory); });
}

}  // namespace pcl
