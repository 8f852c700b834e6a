// The CUDA kernels in Python: as csrc/bindings.cpp, with a stream last. Every function returns CUDA's error number.
#include <nanobind/nanobind.h>

#include "runtime.h"
#include "to_packed.h"
#include "to_padded.h"
#ifdef PCL_CUDA_EMULATED
#include "emulated/block.h"
#endif

namespace nb = nanobind;

namespace {

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int to_packed(uintptr_t padded, uintptr_t offsets, uintptr_t packed, int64_t batch, int64_t max_seqlen, int64_t total,
              int64_t row_bytes, int64_t row_stride, int64_t history_stride, uintptr_t stream) {
  const pcl::PaddedShape shape{batch, max_seqlen, total, row_bytes, row_bytes, row_stride, history_stride};
  return pcl::to_packed_cuda(at<const char>(padded), at<const int64_t>(offsets), at<char>(packed), shape, at(stream));
}

int to_padded(uintptr_t packed, uintptr_t offsets, uintptr_t padding, uintptr_t padded, int64_t batch,
              int64_t max_seqlen, int64_t total, int64_t row_bytes, int64_t packed_stride, uintptr_t stream) {
  const pcl::PaddedShape shape{batch, max_seqlen, total, row_bytes, packed_stride, row_bytes, max_seqlen * row_bytes};
  return pcl::to_padded_cuda(at<const char>(packed), at<const int64_t>(offsets), at<const char>(padding),
                             at<char>(padded), shape, at(stream));
}

}  // namespace

NB_MODULE(PCL_CUDA_MODULE, m) {
  m.def("to_packed", &to_packed);
  m.def("to_padded", &to_padded);
  m.def("error_text", &pcl::cuda_error_text);
  m.def("compiler", &pcl::cuda_compiler);
#ifdef PCL_CUDA_EMULATED
  m.def("set_order", &pcl::emulated::set_order);
#endif
}
