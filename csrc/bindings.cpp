// The only file that knows Python. Addresses and sizes come in; nothing is converted, allocated or checked here: the
// one caller is the op that has just checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "attention_plan.h"
#include "catalogue_cross_entropy.h"
#include "embed.h"
#include "feed_forward.h"
#include "gather_histories.h"
#include "isa.h"
#include "linear.h"
#include "parallel.h"
#include "plan_batches.h"
#include "prompt_attention.h"
#include "to_packed.h"
#include "to_padded.h"
#ifdef PCL_SANITIZE
#include "sanitize/bugs.h"
#endif

namespace nb = nanobind;

namespace {

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

pcl::Isa choose(int isa) {
  const pcl::Isa best = pcl::best_isa();  // asks the system for AMX, whichever is chosen
  return isa < 0 ? best : static_cast<pcl::Isa>(isa);
}

struct AttentionCall {
  pcl::AttentionArgs args;
  pcl::Scalar dtype;
  pcl::Isa isa;
  int threads;
};

// numbers: T, M, H, d, B, R, then row and head strides of q, k, v, prefix_k, prefix_v.
AttentionCall attention_call(nb::tuple pointers, nb::tuple numbers, bool causal, double scale, int dtype, int isa,
                             int threads) {
  const auto number = [&](int i) { return nb::cast<int64_t>(numbers[i]); };
  const auto rows = [&](int i) {
    return pcl::AttentionRows{at(nb::cast<uintptr_t>(pointers[i])), number(6 + 2 * i), number(7 + 2 * i)};
  };
  const pcl::AttentionPlan plan =
      pcl::read_plan(at<const int64_t>(nb::cast<uintptr_t>(pointers[5])), number(4), number(5));
  return {
      {plan, rows(0), rows(1), rows(2), rows(3), rows(4), number(0), number(1), number(2), number(3), scale, causal},
      static_cast<pcl::Scalar>(dtype),
      choose(isa),
      threads};
}

void prompt_attention_fwd(nb::tuple pointers, nb::tuple numbers, bool causal, double scale, int dtype, int isa,
                          int threads, uintptr_t out, uintptr_t stats) {
  const AttentionCall call = attention_call(pointers, numbers, causal, scale, dtype, isa, threads);
  const nb::gil_scoped_release release;
  pcl::prompt_attention_fwd_cpu(call.args, at(out), at(stats), call.dtype, call.isa, call.threads);
}

bool newest_attention_fwd(nb::tuple pointers, nb::tuple numbers, double scale, int dtype, int isa, int threads,
                          uintptr_t out) {
  const AttentionCall call = attention_call(pointers, numbers, true, scale, dtype, isa, threads);
  const nb::gil_scoped_release release;
  return pcl::newest_attention_fwd_cpu(call.args, at(out), call.dtype, call.isa, call.threads);
}

void prompt_attention_bwd(nb::tuple pointers, nb::tuple numbers, bool causal, double scale, int dtype, int isa,
                          int threads, nb::tuple grad_pointers, int64_t grad_row, int64_t grad_head) {
  const AttentionCall call = attention_call(pointers, numbers, causal, scale, dtype, isa, threads);
  const auto pointer = [&](int i) { return at(nb::cast<uintptr_t>(grad_pointers[i])); };
  const int64_t dim = call.args.head_dim;
  const pcl::AttentionGrads grads{{pointer(0), grad_row, grad_head},
                                  {pointer(1), call.args.num_heads * dim, dim},
                                  pointer(2),
                                  pointer(3),
                                  pointer(4),
                                  pointer(5),
                                  pointer(6),
                                  pointer(7)};
  const nb::gil_scoped_release release;
  pcl::prompt_attention_bwd_cpu(call.args, grads, call.dtype, call.isa, call.threads);
}

bool attention_plan(uintptr_t offsets, uintptr_t prefix_offsets, uintptr_t prefix_index, uintptr_t work, int64_t batch,
                    int64_t num_prefixes, int64_t total, int64_t prefix_total) {
  const nb::gil_scoped_release release;
  return pcl::attention_plan_cpu(at<const int64_t>(offsets), at<const int64_t>(prefix_offsets),
                                 at<const int64_t>(prefix_index), at<int64_t>(work), batch, num_prefixes, total,
                                 prefix_total);
}

struct EmbedCall {
  pcl::EmbedRows rows;
  pcl::EmbedShape shape;
};

// numbers: T, B, D, table rows, max_len, K, P, row strides of table, position and grad_out.
EmbedCall embed_call(uintptr_t items, bool wide_items, uintptr_t offsets, uintptr_t prompt_index, nb::tuple numbers) {
  const auto number = [&](int i) { return nb::cast<int64_t>(numbers[i]); };
  return {
      {at(items), wide_items, at<const int64_t>(offsets), at<const int64_t>(prompt_index)},
      {number(0), number(1), number(2), number(3), number(4), number(5), number(6), number(7), number(8), number(9)}};
}

bool embed_fwd(uintptr_t items, bool wide_items, uintptr_t offsets, uintptr_t prompt_index, nb::tuple numbers,
               uintptr_t table, uintptr_t position, uintptr_t prompt, uintptr_t out, int dtype, int isa, int threads) {
  const EmbedCall call = embed_call(items, wide_items, offsets, prompt_index, numbers);
  const nb::gil_scoped_release release;
  return pcl::embed_fwd_cpu(call.rows, at(table), at(position), at(prompt), at(out), call.shape,
                            static_cast<pcl::Scalar>(dtype), choose(isa), threads);
}

bool embed_bwd(uintptr_t items, bool wide_items, uintptr_t offsets, uintptr_t prompt_index, nb::tuple numbers,
               uintptr_t grad_out, uintptr_t grad_table, uintptr_t grad_position, uintptr_t grad_prompt, int dtype,
               int isa, int threads) {
  const EmbedCall call = embed_call(items, wide_items, offsets, prompt_index, numbers);
  const nb::gil_scoped_release release;
  return pcl::embed_bwd_cpu(call.rows, at(grad_out), at(grad_table), at(grad_position), at(grad_prompt), call.shape,
                            static_cast<pcl::Scalar>(dtype), choose(isa), threads);
}

bool to_packed(uintptr_t padded, uintptr_t offsets, uintptr_t packed, int64_t batch, int64_t max_seqlen, int64_t total,
               int64_t row_bytes, int64_t row_stride, int64_t history_stride, int threads) {
  const pcl::PaddedShape shape{batch, max_seqlen, total, row_bytes, row_bytes, row_stride, history_stride};
  const nb::gil_scoped_release release;
  if (!pcl::padded_check_cpu(at<const int64_t>(offsets), shape)) return false;
  pcl::to_packed_cpu(at<const char>(padded), at<const int64_t>(offsets), at<char>(packed), shape, threads);
  return true;
}

bool to_padded(uintptr_t packed, uintptr_t offsets, uintptr_t padding, uintptr_t padded, int64_t batch,
               int64_t max_seqlen, int64_t total, int64_t row_bytes, int64_t packed_stride, int threads) {
  const pcl::PaddedShape shape{batch, max_seqlen, total, row_bytes, packed_stride, row_bytes, max_seqlen * row_bytes};
  const nb::gil_scoped_release release;
  if (!pcl::padded_check_cpu(at<const int64_t>(offsets), shape)) return false;
  pcl::to_padded_cpu(at<const char>(packed), at<const int64_t>(offsets), at<const char>(padding), at<char>(padded),
                     shape, threads);
  return true;
}

// A tensor of rows: address, row stride, number of its dtype.
using Rows = std::tuple<uintptr_t, int64_t, int>;

pcl::Matrix matrix(const Rows& rows) {
  return {at(std::get<0>(rows)), std::get<1>(rows), static_cast<pcl::Scalar>(std::get<2>(rows))};
}

void linear_fwd(Rows x, Rows weight, Rows residual, uintptr_t norm_weight, uintptr_t norm_bias, double eps,
                uintptr_t bias, int64_t rows, int64_t in_dim, int64_t out_dim, uintptr_t out, int out_dtype, int isa,
                int threads) {
  const nb::gil_scoped_release release;
  const pcl::LayerNorm norm{at(norm_weight), at(norm_bias), eps};
  pcl::linear_fwd_cpu({matrix(x), matrix(weight), matrix(residual), norm, at(bias), rows, in_dim, out_dim}, at(out),
                      static_cast<pcl::Scalar>(out_dtype), choose(isa), threads);
}

void linear_bwd(Rows grad_out, Rows x, Rows weight_t, uintptr_t norm_weight, uintptr_t norm_bias, double eps,
                int64_t rows, int64_t in_dim, int64_t out_dim, uintptr_t grad_x, int isa, int threads) {
  const nb::gil_scoped_release release;
  const pcl::LayerNorm norm{at(norm_weight), at(norm_bias), eps};
  pcl::linear_bwd_cpu({matrix(x), matrix(weight_t), {}, norm, nullptr, rows, in_dim, out_dim}, matrix(grad_out),
                      at(grad_x), choose(isa), threads);
}

void feed_forward_fwd(Rows x, Rows weight_in, Rows weight_out, uintptr_t norm_weight, uintptr_t norm_bias, double eps,
                      uintptr_t bias_in, uintptr_t bias_out, int64_t rows, int64_t dim, int64_t hidden, uintptr_t out,
                      int isa, int threads) {
  const nb::gil_scoped_release release;
  const pcl::LayerNorm norm{at(norm_weight), at(norm_bias), eps};
  pcl::feed_forward_fwd_cpu(
      {matrix(x), matrix(weight_in), matrix(weight_out), {}, norm, at(bias_in), at(bias_out), rows, dim, hidden},
      at(out), choose(isa), threads);
}

void feed_forward_bwd(Rows grad_out, Rows x, Rows weight_in, Rows weight_out_t, Rows weight_in_t, uintptr_t norm_weight,
                      uintptr_t norm_bias, double eps, uintptr_t bias_in, int64_t rows, int64_t dim, int64_t hidden,
                      uintptr_t grad_x, int isa, int threads) {
  const nb::gil_scoped_release release;
  const pcl::LayerNorm norm{at(norm_weight), at(norm_bias), eps};
  pcl::feed_forward_bwd_cpu({matrix(x), matrix(weight_in), matrix(weight_out_t), matrix(weight_in_t), norm, at(bias_in),
                             nullptr, rows, dim, hidden},
                            matrix(grad_out), at(grad_x), choose(isa), threads);
}

// pointers: queries, table, bias, target, log_expected, seen, seen_first, older, older_offsets, older_user; results:
// losses, grad_queries, grad_table, grad_bias.
void catalogue_cross_entropy(nb::tuple pointers, nb::tuple results, int64_t rows, int64_t items, int64_t dim,
                             double share, int isa, int threads) {
  const auto floats = [](nb::tuple from, int i) { return at<float>(nb::cast<uintptr_t>(from[i])); };
  const auto numbers = [&](int i) { return at<const int64_t>(nb::cast<uintptr_t>(pointers[i])); };
  const pcl::CatalogueArgs args{floats(pointers, 0),
                                floats(pointers, 1),
                                floats(pointers, 2),
                                numbers(3),
                                floats(pointers, 4),
                                numbers(5),
                                numbers(6),
                                numbers(7),
                                numbers(8),
                                numbers(9),
                                rows,
                                items,
                                dim,
                                static_cast<float>(share)};
  const pcl::CatalogueResults to{floats(results, 0), floats(results, 1), floats(results, 2), floats(results, 3)};
  const nb::gil_scoped_release release;
  pcl::catalogue_cross_entropy_cpu(args, to, choose(isa), threads);
}

pcl::StoredHistories stored_histories(uintptr_t values, uintptr_t offsets, int64_t num_values, int64_t num_histories,
                                      int64_t value_bytes) {
  return {at<const char>(values), at<const int64_t>(offsets), num_values, num_histories, value_bytes};
}

int64_t gather_offsets(uintptr_t values, uintptr_t offsets, int64_t num_values, int64_t num_histories,
                       int64_t value_bytes, uintptr_t rows, uintptr_t cut, int64_t count, int64_t max_len,
                       uintptr_t packed_offsets) {
  const auto stored = stored_histories(values, offsets, num_values, num_histories, value_bytes);
  const pcl::PickedRows picked{at<const int64_t>(rows), at<const int64_t>(cut), count, max_len};
  const nb::gil_scoped_release release;
  return pcl::gather_offsets_cpu(stored, picked, at<int64_t>(packed_offsets));
}

void gather_histories(uintptr_t values, uintptr_t offsets, int64_t num_values, int64_t num_histories,
                      int64_t value_bytes, uintptr_t rows, uintptr_t cut, int64_t count, int64_t max_len,
                      uintptr_t packed_offsets, uintptr_t packed, int threads) {
  const auto stored = stored_histories(values, offsets, num_values, num_histories, value_bytes);
  const pcl::PickedRows picked{at<const int64_t>(rows), at<const int64_t>(cut), count, max_len};
  const nb::gil_scoped_release release;
  pcl::gather_histories_cpu(stored, picked, at<const int64_t>(packed_offsets), at<char>(packed), threads);
}

bool plan_batches(uintptr_t costs, int64_t count, int64_t capacity, int64_t num_bins, uintptr_t bins) {
  const nb::gil_scoped_release release;
  return pcl::plan_batches_cpu(at<const int64_t>(costs), count, capacity, num_bins, at<int64_t>(bins));
}

// Names of the instruction sets this machine can run, narrowest first; a name's place is its number.
nb::list isas() {
  nb::list names;
  for (int i = 0; i <= static_cast<int>(pcl::best_isa()); ++i) names.append(pcl::isa_name(static_cast<pcl::Isa>(i)));
  return names;
}

}  // namespace

NB_MODULE(_C, m) {
  m.def("attention_plan", &attention_plan);
  m.def("prompt_attention_fwd", &prompt_attention_fwd);
  m.def("prompt_attention_bwd", &prompt_attention_bwd);
  m.def("newest_attention_fwd", &newest_attention_fwd);
  m.def("embed_fwd", &embed_fwd);
  m.def("embed_bwd", &embed_bwd);
  m.def("linear_fwd", &linear_fwd);
  m.def("linear_bwd", &linear_bwd);
  m.def("feed_forward_fwd", &feed_forward_fwd);
  m.def("feed_forward_bwd", &feed_forward_bwd);
  m.def("catalogue_cross_entropy", &catalogue_cross_entropy);
  m.def("to_packed", &to_packed);
  m.def("to_padded", &to_padded);
  m.def("gather_offsets", &gather_offsets);
  m.def("gather_histories", &gather_histories);
  m.def("plan_batches", &plan_batches);
  m.def("isas", &isas);
  m.def("has_threads", &pcl::has_threads);
#ifdef __clang__
  m.def("compiler", [] { return __VERSION__; });
#else
  m.def("compiler", [] { return "g++ " __VERSION__; });
#endif
#ifdef PCL_SANITIZE
  m.def("read_past_the_end", [](uintptr_t p, int64_t count) { return pcl::read_past_the_end(at<float>(p), count); });
  m.def("overflow_an_int", &pcl::overflow_an_int);
#endif
}
