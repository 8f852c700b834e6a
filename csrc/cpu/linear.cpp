#include "../linear.h"

#include "../parallel.h"
#include "linear_tasks.h"
#include "scratch.h"

namespace pcl {
namespace {

LinearKernels kernels_of(Scalar dtype, Scalar weight, Isa isa) {
  if (weight == Scalar::kBfloat16) {
#ifdef PCL_AMX
    if (isa == Isa::kAmx) return linear_kernels_amx();
#endif
#ifdef PCL_AVX512_BF16
    if (isa == Isa::kAvx512Bf16) return linear_kernels_avx512bf16();
#endif
    return linear_kernels_emulated_tiles();
  }
#ifdef PCL_X86
  if (dtype != Scalar::kDouble && has_avx512(isa)) return linear_kernels_avx512();
  if (dtype != Scalar::kDouble && isa == Isa::kAvx2) return linear_kernels_avx2();
#endif
  static_cast<void>(isa);
  return linear_kernels_baseline(dtype == Scalar::kDouble);
}

template <class Body>
void for_blocks(const LinearArgs& args, int64_t block_rows, int threads, Body body) {
  const int64_t element = args.x.dtype == Scalar::kDouble ? 8 : 4;
  const int64_t bytes = element * linear_scratch(args.in_dim, args.out_dim);
  threads = threads_for_products(args.rows * args.in_dim * args.out_dim, threads);
  parallel_runs(args.rows, block_rows, kRowStep, threads,
                [&](int64_t first, int64_t rows) { body(Block{first, rows}, scratch(bytes)); });
}

}  // namespace

void linear_fwd_cpu(const LinearArgs& args, void* out, Scalar out_dtype, Isa isa, int threads) {
  const LinearKernels kernels = kernels_of(args.x.dtype, args.weight.dtype, isa);
  for_blocks(args, kernels.block_rows, threads,
             [&](Block block, void* memory) { kernels.fwd(args, out, out_dtype, block, memory); });
}

void linear_bwd_cpu(const LinearArgs& args, const Matrix& grad_out, void* grad_x, Isa isa, int threads) {
  const LinearKernels kernels = kernels_of(args.x.dtype, args.weight.dtype, isa);
  for_blocks(args, kernels.block_rows, threads,
             [&](Block block, void* memory) { kernels.bwd(args, grad_out, grad_x, block, memory); });
}

}  // namespace pcl
