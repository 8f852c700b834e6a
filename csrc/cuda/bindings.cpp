// The CUDA kernels in Python: as csrc/bindings.cpp, with a stream last. What launches returns CUDA's error number; a
// device that does not say what it has is a RuntimeError.
#include <nanobind/nanobind.h>

#include "embed.h"
#include "prompt_attention.h"
#include "runtime.h"
#include "to_packed.h"
#include "to_padded.h"
#ifdef PCL_CUDA_EMULATED
#include "emulated/block.h"
#include "emulated/trials.h"
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

struct EmbedCall {
  pcl::EmbedRows rows;
  pcl::EmbedShape shape;
};

pcl::EmbedShape embed_shape(nb::tuple numbers) {
  const auto number = [&](int i) { return nb::cast<int64_t>(numbers[i]); };
  return {number(0), number(1), number(2), number(3), number(4), number(5), number(6), number(7), number(8), number(9)};
}

EmbedCall embed_call(uintptr_t items, bool wide_items, uintptr_t offsets, uintptr_t prompt_index, nb::tuple numbers) {
  return {{at(items), wide_items, at<const int64_t>(offsets), at<const int64_t>(prompt_index)}, embed_shape(numbers)};
}

int embed_fwd(uintptr_t items, bool wide_items, uintptr_t offsets, uintptr_t prompt_index, nb::tuple numbers,
              uintptr_t table, uintptr_t position, uintptr_t prompt, uintptr_t out, int dtype, uintptr_t stream) {
  const EmbedCall call = embed_call(items, wide_items, offsets, prompt_index, numbers);
  return pcl::embed_fwd_cuda(call.rows, at(table), at(position), at(prompt), at(out), call.shape,
                             static_cast<pcl::Scalar>(dtype), at(stream));
}

int64_t embed_bwd_bytes(nb::tuple numbers, bool position, bool prompt, int dtype) {
  return pcl::embed_bwd_cuda_bytes(embed_shape(numbers), position, prompt, static_cast<pcl::Scalar>(dtype));
}

int embed_bwd(uintptr_t items, bool wide_items, uintptr_t offsets, uintptr_t prompt_index, nb::tuple numbers,
              uintptr_t grad_out, uintptr_t workspace, uintptr_t grad_position, uintptr_t grad_prompt, int dtype,
              uintptr_t stream) {
  const EmbedCall call = embed_call(items, wide_items, offsets, prompt_index, numbers);
  return pcl::embed_bwd_cuda(call.rows, at(grad_out), at(workspace), at(grad_position), at(grad_prompt), call.shape,
                             static_cast<pcl::Scalar>(dtype), at(stream));
}

// pointers: q, k, v, prefix_k, prefix_v, offsets, prefix_offsets, prefix_index; numbers: T, M, H, d, B, R, then row and
// head strides of the first five.
pcl::AttentionArgs attention_args(nb::tuple pointers, nb::tuple numbers, bool causal, double scale) {
  const auto number = [&](int i) { return nb::cast<int64_t>(numbers[i]); };
  const auto rows = [&](int i) {
    return pcl::AttentionRows{at(nb::cast<uintptr_t>(pointers[i])), number(6 + 2 * i), number(7 + 2 * i)};
  };
  const auto values = [&](int i) { return at<const int64_t>(nb::cast<uintptr_t>(pointers[i])); };
  pcl::AttentionPlan plan{};
  plan.batch = number(4);
  plan.num_prefixes = number(5);
  plan.offsets = values(5);
  plan.prefix_offsets = values(6);
  plan.prefix_index = values(7);
  return {plan, rows(0), rows(1), rows(2), rows(3), rows(4), number(0), number(1), number(2), number(3), scale, causal};
}

int prompt_attention_fwd(nb::tuple pointers, nb::tuple numbers, bool causal, double scale, int dtype, uintptr_t out,
                         uintptr_t stats, uintptr_t stream) {
  return pcl::prompt_attention_fwd_cuda(attention_args(pointers, numbers, causal, scale), at(out), at(stats),
                                        static_cast<pcl::Scalar>(dtype), at(stream));
}

int64_t prompt_attention_bwd_bytes(nb::tuple pointers, nb::tuple numbers, bool prefix, int dtype) {
  return pcl::prompt_attention_bwd_cuda_bytes(attention_args(pointers, numbers, true, 1), prefix,
                                              static_cast<pcl::Scalar>(dtype));
}

// grad_pointers: grad_out, out, stats, gradients of q, k, v, prefix_k, prefix_v, then the three of AttentionMembers.
int prompt_attention_bwd(nb::tuple pointers, nb::tuple numbers, bool causal, double scale, int dtype,
                         nb::tuple grad_pointers, int64_t grad_row, int64_t grad_head, uintptr_t workspace,
                         uintptr_t stream) {
  const pcl::AttentionArgs args = attention_args(pointers, numbers, causal, scale);
  const auto pointer = [&](int i) { return at(nb::cast<uintptr_t>(grad_pointers[i])); };
  const pcl::AttentionGrads grads{{pointer(0), grad_row, grad_head},
                                  {pointer(1), args.num_heads * args.head_dim, args.head_dim},
                                  pointer(2),
                                  pointer(3),
                                  pointer(4),
                                  pointer(5),
                                  pointer(6),
                                  pointer(7)};
  const auto numbers_at = [&](int i) { return static_cast<const int64_t*>(pointer(i)); };
  const pcl::AttentionMembers members{numbers_at(8), numbers_at(9), numbers_at(10)};
  return pcl::prompt_attention_bwd_cuda(args, grads, members, at(workspace), static_cast<pcl::Scalar>(dtype),
                                        at(stream));
}

}  // namespace

NB_MODULE(PCL_CUDA_MODULE, m) {
  m.def("to_packed", &to_packed);
  m.def("to_padded", &to_padded);
  m.def("embed_fwd", &embed_fwd);
  m.def("embed_bwd", &embed_bwd);
  m.def("embed_bwd_bytes", &embed_bwd_bytes);
  m.def("prompt_attention_fits", [](int64_t head_dim, int dtype) {
    return pcl::prompt_attention_cuda_fits(head_dim, static_cast<pcl::Scalar>(dtype));
  });
  m.def("prompt_attention_fwd", &prompt_attention_fwd);
  m.def("prompt_attention_bwd", &prompt_attention_bwd);
  m.def("prompt_attention_bwd_bytes", &prompt_attention_bwd_bytes);
  m.def("error_text", &pcl::cuda_error_text);
  m.def("refusal", &pcl::cuda_refusal);
  m.def("compiler", &pcl::cuda_compiler);
#ifdef PCL_CUDA_EMULATED
  m.def("set_order", &pcl::emulated::set_order);
  m.def("set_shared_bytes", &pcl::emulated::set_shared_bytes);
  m.def("last_shared_bytes", &pcl::emulated::last_shared_bytes);
  m.def("set_answer", &pcl::emulated::set_answer);
  m.def("product", [](uintptr_t a, uintptr_t b, uintptr_t c, int dtype, bool transposed, bool wait) {
    return pcl::emulated::product(at(a), at(b), at<float>(c), static_cast<pcl::Scalar>(dtype), transposed, wait);
  });
  m.def("make_mistake", [](int which, uintptr_t source) {
    return pcl::emulated::make_mistake(static_cast<pcl::emulated::Mistake>(which), at(source));
  });
  m.def("race", [](uintptr_t out) { return pcl::emulated::race(at<int>(out)); });
#endif
}
