#include "embed_kernel.h"

namespace pcl {

EmbedKernels embed_kernels_avx512(Scalar dtype) { return embed_kernels<64>(dtype); }

}  // namespace pcl
