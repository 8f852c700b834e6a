#include "../embed.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "../parallel.h"
#include "embed_tasks.h"

namespace pcl {
namespace {

constexpr int64_t kRowsPerTask = 512;
constexpr int64_t kDistancesPerTask = 8;
constexpr int64_t kItemsPerTask = 256;

EmbedKernels kernels_of(Scalar dtype, Isa isa) {
#ifdef PCL_X86
  if (has_avx512(isa)) return embed_kernels_avx512(dtype);
  if (isa == Isa::kAvx2) return embed_kernels_avx2(dtype);
#endif
  static_cast<void>(isa);
  return embed_kernels_baseline(dtype);
}

// Offsets run from 0 to total without falling, histories fit the positions, prompt numbers are in -1..K-1.
bool check_histories(const EmbedRows& rows, const EmbedShape& shape) {
  if (rows.offsets[0] != 0 || rows.offsets[shape.batch] != shape.total) return false;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t begin = rows.offsets[b], end = rows.offsets[b + 1];
    if (end < begin || (shape.max_len >= 0 && end - begin > shape.max_len)) return false;
    if (rows.prompt_index && (rows.prompt_index[b] < -1 || rows.prompt_index[b] >= shape.num_prompts)) return false;
  }
  return true;
}

// Calls each(task) for tasks of `size` out of `count`.
template <class Each>
void share(int64_t count, int64_t size, int threads, Each each) {
  parallel_for_shares((count + size - 1) / size, threads,
                      [&](int64_t i) { each(EmbedTask{i * size, std::min((i + 1) * size, count)}); });
}

int threads_of(const EmbedShape& shape, Scalar dtype, int threads) {
  const int64_t bytes = dtype == Scalar::kDouble ? 8 : dtype == Scalar::kFloat ? 4 : 2;
  return threads_for_bytes(shape.total * shape.dim * bytes, threads);
}

int64_t item(const EmbedRows& rows, int64_t t) {
  return rows.wide_items ? static_cast<const int64_t*>(rows.items)[t] : static_cast<const int32_t*>(rows.items)[t];
}

// Rows sorted by item (a counting sort keeps their order); each table row then sums its own.
void bwd_table(const EmbedRows& rows, const EmbedGrads& grads, const EmbedShape& shape, const EmbedKernels& kernels,
               int threads) {
  std::vector<int64_t> begin(shape.table_rows + 1, 0), order(shape.total);
  for (int64_t t = 0; t < shape.total; ++t) ++begin[item(rows, t) + 1];
  for (int64_t i = 0; i < shape.table_rows; ++i) begin[i + 1] += begin[i];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t t = 0; t < shape.total; ++t) order[next[item(rows, t)]++] = t;
  share(shape.table_rows, kItemsPerTask, threads, [&](const EmbedTask& task) {
    std::vector<double> sums(shape.dim);
    kernels.bwd_table({begin.data(), order.data()}, grads, shape, task, sums.data());
  });
}

}  // namespace

bool embed_fwd_cpu(const EmbedRows& rows, const void* table, const void* position, const void* prompt, void* out,
                   const EmbedShape& shape, Scalar dtype, Isa isa, int threads) {
  if (!check_histories(rows, shape)) return false;
  const EmbedKernels kernels = kernels_of(dtype, isa);
  std::atomic<bool> right{true};
  share(shape.total, kRowsPerTask, threads_of(shape, dtype, threads), [&](const EmbedTask& task) {
    if (!kernels.fwd(rows, {table, position, prompt, out}, shape, task)) right = false;
  });
  return right;
}

bool embed_bwd_cpu(const EmbedRows& rows, const void* grad_out, void* grad_table, void* grad_position,
                   void* grad_prompt, const EmbedShape& shape, Scalar dtype, Isa isa, int threads) {
  const EmbedKernels kernels = kernels_of(dtype, isa);
  if (!check_histories(rows, shape)) return false;
  threads = threads_of(shape, dtype, threads);
  const EmbedGrads grads{grad_out, grad_position, grad_prompt, grad_table};
  if (grad_table) {
    if (!kernels.check(rows, shape, {0, shape.total})) return false;
    bwd_table(rows, grads, shape, kernels, threads);
  }
  const int64_t distances = std::max(grad_position ? shape.max_len : 0, grad_prompt ? shape.prompt_len : 0);
  share(distances, kDistancesPerTask, threads, [&](const EmbedTask& task) {
    std::vector<double> sums(distance_sums(shape, grads, task), 0.0);
    kernels.bwd_distances(rows, grads, shape, task, sums.data());
  });
  return true;
}

}  // namespace pcl
