#include "amx_tiles.h"
#include "prompt_attention_bf16_bwd_kernel.h"

namespace pcl {

AttentionKernels attention_kernels_amx() { return bf16_kernels<TileEngine<AmxTiles>>(); }

}  // namespace pcl
