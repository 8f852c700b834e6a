#include "amx_tiles.h"
#include "bf16_weights.h"
#include "feed_forward_kernel.h"

namespace pcl {

FeedForwardKernels feed_forward_kernels_amx() {
  return feed_forward_kernels_of<Wide, PairWeights<TileEngine<AmxTiles>>>();
}

}  // namespace pcl
