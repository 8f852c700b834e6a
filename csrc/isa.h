// Which compiled copy of a hot kernel runs.
#pragma once

#include <cstdint>

namespace pcl {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The widest that was compiled and that this processor and system can run.
Isa best_isa();

const char* isa_name(Isa isa);

enum class Scalar : int { kFloat = 0, kDouble = 1, kBfloat16 = 2 };

}  // namespace pcl
