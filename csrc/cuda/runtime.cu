#include <string>

#include "device.h"

namespace pcl {

const char* cuda_error_text(int number) { return error_text(number); }

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
