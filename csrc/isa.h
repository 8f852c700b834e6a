// Which compiled copy of a hot kernel runs.
#pragma once

#include <cstdint>

namespace pcl {

// The last two of processors are AVX-512 with products of bfloat16; other types keep the kernels of kAvx512 there.
// kEmulatedTiles computes in plain C++ what AMX would, for tests of bfloat16 kernels; it is never chosen.
enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kEmulatedTiles = 5 };

constexpr bool has_avx512(Isa isa) { return isa >= Isa::kAvx512 && isa <= Isa::kAmx; }

// The widest that was compiled and that this processor and system can run. The first call asks Linux for AMX's tiles.
Isa best_isa();

const char* isa_name(Isa isa);

enum class Scalar : int { kFloat = 0, kDouble = 1, kBfloat16 = 2, kHalf = 3 };  // kHalf: CUDA alone

}  // namespace pcl
