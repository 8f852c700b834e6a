#include "device.h"
#include "runtime.h"

namespace pcl {

namespace {

#ifdef __CUDACC__
#define PCL_TEXT(number) #number
#define PCL_TEXT_OF(number) PCL_TEXT(number)
constexpr char kCompiler[] = "nvcc " PCL_TEXT_OF(__CUDACC_VER_MAJOR__) "." PCL_TEXT_OF(__CUDACC_VER_MINOR__);
#else
constexpr char kCompiler[] = "emulated by g++ " __VERSION__;
#endif

}  // namespace

const char* cuda_error_text(int number) { return error_text(number); }

const char* cuda_compiler() { return kCompiler; }

}  // namespace pcl
