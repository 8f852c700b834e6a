// The work of one task of embed, once per instruction set. See ../embed.h for what is computed. Included only by the
// files that are compiled once per instruction set: everything here is in an unnamed namespace, and nothing of the
// standard library is instantiated.
#pragma once

#include <cstdint>
#include <cstring>

#include "embed_tasks.h"
#include "scalar.h"

namespace pcl {
namespace {

template <class E, int kBytes>
struct Vector {
  typedef E V __attribute__((vector_size(kBytes)));
};

// Vectors of kBytes that hold elements of type T in the type they are added in.
template <class T, int kBytes>
struct Row {
  using A = decltype(widen(T{}));
  static constexpr int kLanes = kBytes / sizeof(A);
  using V = typename Vector<A, kBytes>::V;
  using Double = typename Vector<double, kBytes>::V;
  typedef A Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(A)), may_alias));

  static V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(V v, T* p) { *reinterpret_cast<Unaligned*>(p) = v; }
  // As many elements as a vector holds doubles.
  static Double load_double(const T* p) {
    typename Vector<T, kBytes / sizeof(double) * sizeof(T)>::V v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Double);
  }
};

template <int kBytes>
struct Row<Bfloat16, kBytes> {
  using A = float;
  static constexpr int kLanes = kBytes / sizeof(A);
  using V = typename Vector<float, kBytes>::V;
  using Wide = typename Vector<uint32_t, kBytes>::V;
  using Narrow = typename Vector<uint16_t, kBytes / 2>::V;

  static V load(const Bfloat16* p) {
    Narrow bits;
    std::memcpy(&bits, p, sizeof bits);
    const Wide wide = __builtin_convertvector(bits, Wide) << 16;
    V v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
  }
  static typename Row<double, kBytes>::Double load_double(const Bfloat16* p) {
    constexpr int kDoubles = kBytes / sizeof(double);
    float wide[kDoubles];
    for (int i = 0; i < kDoubles; ++i) wide[i] = widen(p[i]);
    return Row<float, kBytes>::load_double(wide);
  }
  static void store(V v, Bfloat16* p) {  // as narrow() of scalar.h
    Wide bits;
    std::memcpy(&bits, &v, sizeof bits);
    const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Wide nan = (bits >> 16) | 0x40u;
    const Narrow narrow = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Narrow);
    std::memcpy(p, &narrow, sizeof narrow);
  }
};

inline int64_t prompt_of(const EmbedRows& rows, int64_t b) { return rows.prompt_index ? rows.prompt_index[b] : 0; }

template <class Id>
bool ids_inside(const Id* ids, int64_t count, int64_t table_rows) {
  Id lowest = 0, highest = 0;
  for (int64_t t = 0; t < count; ++t) {
    lowest = ids[t] < lowest ? ids[t] : lowest;
    highest = ids[t] > highest ? ids[t] : highest;
  }
  return lowest >= 0 && highest < table_rows;
}

inline bool check_task(const EmbedRows& rows, const EmbedShape& shape, const EmbedTask& task) {
  const int64_t count = task.last - task.first;
  if (rows.wide_items) {
    return ids_inside(static_cast<const int64_t*>(rows.items) + task.first, count, shape.table_rows);
  }
  return ids_inside(static_cast<const int32_t*>(rows.items) + task.first, count, shape.table_rows);
}

// The rows of a run of packed rows: out[i] = table[ids[i]] + position[-i] + prompt[i].
template <class T, class Id>
struct Run {
  const Id* ids;
  int64_t count;
  const T *table, *position, *prompt;
  T* out;
};

// A row's width that the compiler knows.
template <int64_t kDim>
struct Width {
  constexpr operator int64_t() const { return kDim; }
};

// dim: the width of a row, a Width or a number.
template <class T, int kBytes, bool kPosition, bool kPrompt, class Id, class Dim>
void sum_run(const Run<T, Id>& run, const EmbedShape& shape, Dim dim) {
  using R = Row<T, kBytes>;
  const T *position = run.position, *prompt = run.prompt;
  T* out = run.out;
  for (int64_t i = 0; i < run.count; ++i) {
    const T* from = run.table + run.ids[i] * shape.table_stride;
    int64_t c = 0;
    for (; c + R::kLanes <= dim; c += R::kLanes) {
      typename R::V sum = R::load(from + c);
      if (kPosition) sum += R::load(position + c);
      if (kPrompt) sum += R::load(prompt + c);
      R::store(sum, out + c);
    }
    for (; c < dim; ++c) {
      auto sum = widen(from[c]);
      if (kPosition) sum += widen(position[c]);
      if (kPrompt) sum += widen(prompt[c]);
      narrow(sum, out + c);
    }
    out += dim;
    if (kPosition) position -= shape.position_stride;
    if (kPrompt) prompt += dim;
  }
}

template <class T, int kBytes, class Id, class Dim>
bool fwd_ids(const Id* ids, const EmbedRows& rows, const EmbedTables& tables, const EmbedShape& shape,
             const EmbedTask& task, Dim dim) {
  if (!ids_inside(ids + task.first, task.last - task.first, shape.table_rows)) return false;
  const T* table = static_cast<const T*>(tables.table);
  const T *positions = static_cast<const T*>(tables.position), *prompts = static_cast<const T*>(tables.prompt);
  int64_t b = 0;  // the history of row `first`: offsets[b] <= first < offsets[b + 1]
  for (int64_t end = shape.batch; end - b > 1;) {
    const int64_t middle = b + (end - b) / 2;
    (rows.offsets[middle] <= task.first ? b : end) = middle;
  }
  for (int64_t t = task.first; t < task.last; ++b) {
    const int64_t end = rows.offsets[b + 1], last = end < task.last ? end : task.last;
    const int64_t which = prompts ? prompt_of(rows, b) : -1;
    const int64_t prompted = which < 0 ? end : end - shape.prompt_len;  // rows from here on get a prompt
    while (t < last) {
      const bool with_prompt = t >= prompted;
      const int64_t until = with_prompt || last < prompted ? last : prompted;
      Run<T, Id> run{ids + t, until - t, table, nullptr, nullptr, static_cast<T*>(tables.out) + t * shape.dim};
      if (positions) run.position = positions + (end - 1 - t) * shape.position_stride;
      if (with_prompt) run.prompt = prompts + (which * shape.prompt_len + t - prompted) * shape.dim;
      if (positions && with_prompt) sum_run<T, kBytes, true, true>(run, shape, dim);
      if (positions && !with_prompt) sum_run<T, kBytes, true, false>(run, shape, dim);
      if (!positions && with_prompt) sum_run<T, kBytes, false, true>(run, shape, dim);
      if (!positions && !with_prompt) sum_run<T, kBytes, false, false>(run, shape, dim);
      t = until;
    }
  }
  return true;
}

template <class T, int kBytes>
bool fwd_task(const EmbedRows& rows, const EmbedTables& tables, const EmbedShape& shape, const EmbedTask& task) {
  const auto with_width = [&](auto dim) {
    if (rows.wide_items)
      return fwd_ids<T, kBytes>(static_cast<const int64_t*>(rows.items), rows, tables, shape, task, dim);
    return fwd_ids<T, kBytes>(static_cast<const int32_t*>(rows.items), rows, tables, shape, task, dim);
  };
  switch (shape.dim) {
    case 32:
      return with_width(Width<32>());
    case 64:
      return with_width(Width<64>());
    case 128:
      return with_width(Width<128>());
    default:
      return with_width(shape.dim);
  }
}

constexpr int kTogether = 4;  // rows added to a row of sums while it is in registers

// sums[c] += from[0][c], then from[1][c], and so on.
template <class T, int kBytes, int kCount>
void add_rows(const T* const* from, int64_t dim, double* sums) {
  using D = Row<double, kBytes>;
  int64_t c = 0;
  for (; c + D::kLanes <= dim; c += D::kLanes) {
    typename D::V sum = D::load(sums + c);
    for (int r = 0; r < kCount; ++r) sum += Row<T, kBytes>::load_double(from[r] + c);
    D::store(sum, sums + c);
  }
  for (; c < dim; ++c) {
    for (int r = 0; r < kCount; ++r) sums[c] += widen(from[r][c]);
  }
}

template <class T, int kBytes>
void add_some(const T* const* from, int count, int64_t dim, double* sums) {
  static_assert(kTogether == 4);
  switch (count) {
    case 1:
      return add_rows<T, kBytes, 1>(from, dim, sums);
    case 2:
      return add_rows<T, kBytes, 2>(from, dim, sums);
    case 3:
      return add_rows<T, kBytes, 3>(from, dim, sums);
    case 4:
      return add_rows<T, kBytes, 4>(from, dim, sums);
    default:
      return;
  }
}

template <class T>
void write_row(const double* sums, int64_t dim, T* to) {
  for (int64_t c = 0; c < dim; ++c) narrow(static_cast<decltype(widen(T{}))>(sums[c]), to + c);
}

// Up to kTogether histories that follow each other, in their order: the last row of each and its length.
template <class T>
struct Few {
  const T* newest[kTogether];
  int64_t length[kTogether], prompt[kTogether];
  int count = 0;
};

// Adds the rows of few[first .. last - 1] that are `distance` before the end, for each of the task's distances, to
// sums, one row a distance.
template <class T, int kBytes>
void add_few(const Few<T>& few, int first, int last, const EmbedShape& shape, int64_t begin, int64_t end,
             double* sums) {
  for (int64_t distance = end - 1; distance >= begin; --distance) {
    const T* from[kTogether];
    int count = 0;
    for (int i = first; i < last; ++i) {
      if (distance < few.length[i]) from[count++] = few.newest[i] - distance * shape.grad_stride;
    }
    add_some<T, kBytes>(from, count, shape.dim, sums + (distance - begin) * shape.dim);
  }
}

// The sums of a task: the prompts' are the positions' where all histories see the one prompt there is.
struct DistanceSums {
  double *position, *prompt;
  int64_t prompted;  // distances with a prompt row, the task's first ones

  DistanceSums(const EmbedRows& rows, const EmbedGrads& grads, const EmbedShape& shape, const EmbedTask& task,
               double* sums)
      : position(sums), prompt(nullptr), prompted(prompt_distances(shape, grads, task)) {
    if (prompted == 0) return;
    const bool all_see_it = shape.num_prompts == 1 && !rows.prompt_index;
    prompt = all_see_it ? position : position + (task.last - task.first) * shape.dim;
  }
};

template <class T, int kBytes>
void add_histories(const Few<T>& few, const EmbedShape& shape, const EmbedTask& task, bool position,
                   const DistanceSums& sums) {
  const bool apart = sums.prompt != sums.position;
  if (position || !apart) {
    add_few<T, kBytes>(few, 0, few.count, shape, task.first, task.last, sums.position);
  }
  if (!sums.prompt || !apart) return;
  for (int i = 0, next; i < few.count; i = next) {  // runs that see the same prompt
    next = i + 1;
    while (next < few.count && few.prompt[next] == few.prompt[i]) ++next;
    if (few.prompt[i] < 0) continue;
    double* to = sums.prompt + few.prompt[i] * sums.prompted * shape.dim;
    add_few<T, kBytes>(few, i, next, shape, task.first, task.first + sums.prompted, to);
  }
}

template <class T, int kBytes>
void bwd_distances(const EmbedRows& rows, const EmbedGrads& grads, const EmbedShape& shape, const EmbedTask& task,
                   double* scratch) {
  const DistanceSums sums(rows, grads, shape, task, scratch);
  const T* grad_out = static_cast<const T*>(grads.grad_out);
  Few<T> few;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t end = rows.offsets[b + 1], length = end - rows.offsets[b];
    if (length <= task.first) continue;
    few.newest[few.count] = grad_out + (end - 1) * shape.grad_stride;
    few.length[few.count] = length;
    few.prompt[few.count++] = prompt_of(rows, b);
    if (few.count < kTogether) continue;
    add_histories<T, kBytes>(few, shape, task, grads.position, sums);
    few.count = 0;
  }
  add_histories<T, kBytes>(few, shape, task, grads.position, sums);
  const int64_t dim = shape.dim, distances = task.last - task.first;
  for (int64_t i = 0; i < distances && grads.position && task.first + i < shape.max_len; ++i) {
    write_row(sums.position + i * dim, dim, static_cast<T*>(grads.position) + (task.first + i) * dim);
  }
  for (int64_t k = 0; k < shape.num_prompts && sums.prompt; ++k) {
    T* to = static_cast<T*>(grads.prompt) + ((k + 1) * shape.prompt_len - 1) * dim;
    for (int64_t i = 0; i < sums.prompted; ++i) {
      write_row(sums.prompt + (k * sums.prompted + i) * dim, dim, to - (task.first + i) * dim);
    }
  }
}

template <class T, int kBytes>
void bwd_table(const EmbedSorted& sorted, const EmbedGrads& grads, const EmbedShape& shape, const EmbedTask& task,
               double* sums) {
  const T* grad_out = static_cast<const T*>(grads.grad_out);
  for (int64_t i = task.first; i < task.last; ++i) {
    for (int64_t c = 0; c < shape.dim; ++c) sums[c] = 0;
    for (int64_t s = sorted.begin[i]; s < sorted.begin[i + 1]; s += kTogether) {
      const T* from[kTogether];
      int count = 0;
      for (; count < kTogether && s + count < sorted.begin[i + 1]; ++count) {
        from[count] = grad_out + sorted.order[s + count] * shape.grad_stride;
      }
      add_some<T, kBytes>(from, count, shape.dim, sums);
    }
    write_row(sums, shape.dim, static_cast<T*>(grads.table) + i * shape.dim);
  }
}

template <class T, int kBytes>
constexpr EmbedKernels embed_kernels() {
  return {fwd_task<T, kBytes>, check_task, bwd_distances<T, kBytes>, bwd_table<T, kBytes>};
}

template <int kBytes>
EmbedKernels embed_kernels(Scalar dtype) {
  switch (dtype) {
    case Scalar::kDouble:
      return embed_kernels<double, kBytes>();
    case Scalar::kBfloat16:
      return embed_kernels<Bfloat16, kBytes>();
    default:
      return embed_kernels<float, kBytes>();
  }
}

}  // namespace
}  // namespace pcl
