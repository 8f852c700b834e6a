// What the library says about itself and about errors.
#pragma once

namespace pcl {

// CUDA's words for an error number that an op returned.
const char* cuda_error_text(int number);

// "nvcc 13.0" or so.
const char* cuda_compiler();

}  // namespace pcl
