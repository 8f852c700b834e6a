#include "amx_tiles.h"
#include "prompt_attention_bf16_bwd_kernel.h"

namespace pcl {

AttentionKernels attention_kernels_emulated_tiles() { return bf16_kernels<TileEngine<EmulatedTiles>>(); }

}  // namespace pcl
