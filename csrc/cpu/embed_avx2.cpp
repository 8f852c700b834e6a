#include "embed_kernel.h"

namespace pcl {

EmbedKernels embed_kernels_avx2(Scalar dtype) { return embed_kernels<32>(dtype); }

}  // namespace pcl
