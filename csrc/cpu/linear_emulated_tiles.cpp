#include "amx_tiles.h"
#include "bf16_weights.h"
#include "linear_kernel.h"

namespace pcl {

LinearKernels linear_kernels_emulated_tiles() {
  return linear_kernels_of<Wide, PairWeights<TileEngine<EmulatedTiles>>>();
}

}  // namespace pcl
