#include "../embed.h"

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "scalar.h"

namespace pcl {
namespace {

constexpr int64_t kRowsPerTask = 512;

int64_t tasks_of(int64_t rows, int64_t per_task) { return (rows + per_task - 1) / per_task; }

int64_t item(const EmbedRows& rows, int64_t t) {
  return rows.wide_items ? static_cast<const int64_t*>(rows.items)[t] : static_cast<const int32_t*>(rows.items)[t];
}

int64_t prompt_of(const EmbedRows& rows, int64_t b) { return rows.prompt_index ? rows.prompt_index[b] : 0; }

template <class T>
void add_row(const T* from, int64_t dim, decltype(widen(T{}))* sum) {
  for (int64_t c = 0; c < dim; ++c) sum[c] += widen(from[c]);
}

template <class T>
void fwd_rows(const EmbedRows& rows, const T* table, const T* position, const T* prompt, T* out,
              const EmbedShape& shape, int64_t first, int64_t last) {
  using A = decltype(widen(T{}));
  std::vector<A> sum(shape.dim);
  int64_t b = std::upper_bound(rows.offsets, rows.offsets + shape.batch + 1, first) - rows.offsets - 1;
  for (int64_t t = first; t < last; ++t) {
    while (t >= rows.offsets[b + 1]) ++b;
    const int64_t distance = rows.offsets[b + 1] - 1 - t, which = prompt ? prompt_of(rows, b) : -1;
    const T* from = table + item(rows, t) * shape.table_stride;
    for (int64_t c = 0; c < shape.dim; ++c) sum[c] = widen(from[c]);
    if (position) add_row(position + distance * shape.position_stride, shape.dim, sum.data());
    if (which >= 0 && distance < shape.prompt_len) {
      add_row(prompt + (which * shape.prompt_len + shape.prompt_len - 1 - distance) * shape.dim, shape.dim, sum.data());
    }
    for (int64_t c = 0; c < shape.dim; ++c) narrow(sum[c], out + t * shape.dim + c);
  }
}

template <class T>
void fwd(const EmbedRows& rows, const void* table, const void* position, const void* prompt, void* out,
         const EmbedShape& shape, int threads) {
  threads = threads_for(shape.total * shape.dim * static_cast<int64_t>(sizeof(T)), threads);
  parallel_for(tasks_of(shape.total, kRowsPerTask), threads, [&](int64_t task) {
    const int64_t first = task * kRowsPerTask;
    fwd_rows(rows, static_cast<const T*>(table), static_cast<const T*>(position), static_cast<const T*>(prompt),
             static_cast<T*>(out), shape, first, std::min(first + kRowsPerTask, shape.total));
  });
}

template <class T>
void write_row(const double* sum, int64_t dim, T* to) {
  for (int64_t c = 0; c < dim; ++c) narrow(static_cast<decltype(widen(T{}))>(sum[c]), to + c);
}

template <class T>
struct Backward {
  const EmbedRows& rows;
  const T* grad_out;
  const EmbedShape& shape;
  int threads;

  const T* grad_row(int64_t t) const { return grad_out + t * shape.grad_stride; }

  void add(int64_t t, double* sum) const {
    const T* from = grad_row(t);
    for (int64_t c = 0; c < shape.dim; ++c) sum[c] += widen(from[c]);
  }

  // Each distance from the end is one task: it visits every history that is long enough.
  void position(T* grad) const {
    parallel_for(shape.max_len, threads, [&](int64_t distance) {
      std::vector<double> sum(shape.dim, 0.0);
      for (int64_t b = 0; b < shape.batch; ++b) {
        const int64_t t = rows.offsets[b + 1] - 1 - distance;
        if (t >= rows.offsets[b]) add(t, sum.data());
      }
      write_row(sum.data(), shape.dim, grad + distance * shape.dim);
    });
  }

  void prompt(T* grad) const {
    parallel_for(shape.prompt_len, threads, [&](int64_t distance) {
      std::vector<double> sums(shape.num_prompts * shape.dim, 0.0);
      for (int64_t b = 0; b < shape.batch; ++b) {
        const int64_t t = rows.offsets[b + 1] - 1 - distance, which = prompt_of(rows, b);
        if (which >= 0 && t >= rows.offsets[b]) add(t, sums.data() + which * shape.dim);
      }
      for (int64_t k = 0; k < shape.num_prompts; ++k) {
        const int64_t row = k * shape.prompt_len + shape.prompt_len - 1 - distance;
        write_row(sums.data() + k * shape.dim, shape.dim, grad + row * shape.dim);
      }
    });
  }

  // Rows sorted by item (counting sort keeps their order); each table row then sums its own.
  void table(T* grad) const {
    std::vector<int64_t> begin(shape.table_rows + 1, 0), sorted(shape.total);
    for (int64_t t = 0; t < shape.total; ++t) ++begin[item(rows, t) + 1];
    for (int64_t i = 0; i < shape.table_rows; ++i) begin[i + 1] += begin[i];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t t = 0; t < shape.total; ++t) sorted[next[item(rows, t)]++] = t;
    constexpr int64_t kItemsPerTask = 256;
    parallel_for(tasks_of(shape.table_rows, kItemsPerTask), threads, [&](int64_t task) {
      std::vector<double> sum(shape.dim);
      for (int64_t i = task * kItemsPerTask; i < std::min((task + 1) * kItemsPerTask, shape.table_rows); ++i) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int64_t s = begin[i]; s < begin[i + 1]; ++s) add(sorted[s], sum.data());
        write_row(sum.data(), shape.dim, grad + i * shape.dim);
      }
    });
  }
};

template <class T>
void bwd(const EmbedRows& rows, const void* grad_out, void* grad_table, void* grad_position, void* grad_prompt,
         const EmbedShape& shape, int threads) {
  threads = threads_for(shape.total * shape.dim * static_cast<int64_t>(sizeof(T)), threads);
  const Backward<T> backward{rows, static_cast<const T*>(grad_out), shape, threads};
  if (grad_table) backward.table(static_cast<T*>(grad_table));
  if (grad_position) backward.position(static_cast<T*>(grad_position));
  if (grad_prompt) backward.prompt(static_cast<T*>(grad_prompt));
}

}  // namespace

bool embed_check_cpu(const EmbedRows& rows, const EmbedShape& shape) {
  if (rows.offsets[0] != 0 || rows.offsets[shape.batch] != shape.total) return false;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t length = rows.offsets[b + 1] - rows.offsets[b];
    if (length < 0 || (shape.max_len >= 0 && length > shape.max_len)) return false;
    if (rows.prompt_index && (rows.prompt_index[b] < -1 || rows.prompt_index[b] >= shape.num_prompts)) return false;
  }
  bool inside = true;
  for (int64_t t = 0; t < shape.total; ++t)
    inside &= static_cast<uint64_t>(item(rows, t)) < static_cast<uint64_t>(shape.table_rows);
  return inside;
}

void embed_fwd_cpu(const EmbedRows& rows, const void* table, const void* position, const void* prompt, void* out,
                   const EmbedShape& shape, Scalar dtype, int threads) {
  switch (dtype) {
    case Scalar::kDouble:
      return fwd<double>(rows, table, position, prompt, out, shape, threads);
    case Scalar::kBfloat16:
      return fwd<Bfloat16>(rows, table, position, prompt, out, shape, threads);
    default:
      return fwd<float>(rows, table, position, prompt, out, shape, threads);
  }
}

void embed_bwd_cpu(const EmbedRows& rows, const void* grad_out, void* grad_table, void* grad_position,
                   void* grad_prompt, const EmbedShape& shape, Scalar dtype, int threads) {
  switch (dtype) {
    case Scalar::kDouble:
      return bwd<double>(rows, grad_out, grad_table, grad_position, grad_prompt, shape, threads);
    case Scalar::kBfloat16:
      return bwd<Bfloat16>(rows, grad_out, grad_table, grad_position, grad_prompt, shape, threads);
    default:
      return bwd<float>(rows, grad_out, grad_table, grad_position, grad_prompt, shape, threads);
  }
}

}  // namespace pcl
