#include "embed_kernel.h"

namespace pcl {

EmbedKernels embed_kernels_baseline(Scalar dtype) { return embed_kernels<16>(dtype); }

}  // namespace pcl
