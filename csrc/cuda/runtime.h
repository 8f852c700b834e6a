// What the library says about itself and about errors.
#pragma once

namespace pcl {

// CUDA's words for an error number that an op returned.
const char* cuda_error_text(int number);

// Throws std::runtime_error with CUDA's words unless number is 0: for what is asked of a device. A guess in place of the
// answer would choose a slower way without a word, or another size in one place than in the next.
void check_answer(int number);

// CUDA's error number where the current device cannot run the kernels, 0 where it can: there may be no driver or one older
// than the runtime, no device, or no code for it in here.
int cuda_refusal();

// "nvcc 13.0" or so.
const char* cuda_compiler();

}  // namespace pcl
