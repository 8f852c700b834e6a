#include <stdexcept>
#include <string>

#include "device.h"
#include "runtime.h"

namespace pcl {

const char* cuda_error_text(int number) { return error_text(number); }

void check_answer(int number) {
  if (number == 0) return;
  throw std::runtime_error("the CUDA device does not say what it has: CUDA error " + std::to_string(number) + ", " +
                           error_text(number));
}

#ifdef __CUDACC__
namespace {

__global__ void nothing_kernel() {}

}  // namespace

int cuda_refusal() {
  cudaFuncAttributes found;
  return cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(nothing_kernel));
}
#else
int cuda_refusal() { return emulated::answer(); }
#endif

const char* cuda_compiler() {
#ifdef __CUDACC__
  static const std::string name =
      "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
  return name.c_str();
#else
  return "emulated by g++ " __VERSION__;
#endif
}

}  // namespace pcl
