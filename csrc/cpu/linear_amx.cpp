#include "amx_tiles.h"
#include "bf16_weights.h"
#include "linear_kernel.h"

namespace pcl {

LinearKernels linear_kernels_amx() { return linear_kernels_of<Wide, PairWeights<TileEngine<AmxTiles>>>(); }

}  // namespace pcl
