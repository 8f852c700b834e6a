#include "../catalogue_cross_entropy.h"

#include "../parallel.h"
#include "catalogue_cross_entropy_tasks.h"
#include "scratch.h"

namespace pcl {
namespace {

constexpr int64_t kStep = 12;         // rows are shared out in multiples of this, which is one of every tile's rows
constexpr int64_t kRunRows = 96;      // at most: for each run of rows the table is read twice
constexpr int64_t kRunColumns = 48;   // another multiple
constexpr int64_t kBlockRows = 240;   // at most: they are the terms of one sum
constexpr int64_t kScores = 1 << 22;  // held at a time, of 12 rows at least: 16 MB

CatalogueKernels kernels_of(Isa isa) {
#ifdef PCL_X86
  if (has_avx512(isa)) return catalogue_kernels_avx512();
  if (isa == Isa::kAvx2) return catalogue_kernels_avx2();
#endif
  static_cast<void>(isa);
  return catalogue_kernels_baseline();
}

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

int64_t up(int64_t count, int64_t size) { return parts(count, size) * size; }

// Calls run(first, count) for runs of `size` of `total`, shared among threads.
template <class Run>
void for_runs(int64_t total, int64_t size, int threads, Run run) {
  parallel_for(parts(total, size), threads, [&](int64_t i) { run(i * size, std::min(size, total - i * size)); });
}

}  // namespace

void catalogue_cross_entropy_cpu(const CatalogueArgs& args, const CatalogueResults& results, Isa isa, int threads) {
  const CatalogueKernels kernels = kernels_of(isa);
  const int64_t panels = parts(args.items, kernels.panel), width = panels * kernels.panel, row = width + 16;
  const int64_t most = std::clamp<int64_t>(kScores / row, kStep, kBlockRows) / kStep * kStep;
  const int64_t block = std::min(most, up(args.rows, kStep));
  threads = threads_for_products(args.rows * args.items * args.dim, threads);
  const int64_t shares = threads * parts(block, threads * kRunRows), run = up(parts(block, shares), kStep);
  // the calling thread's scratch, which all threads use
  float* memory = static_cast<float*>(scratch(4 * (width * (args.dim + 1) + block * (row + args.dim + 1))));
  const auto take = [&](int64_t count) {
    float* piece = memory;
    memory += count;
    return piece;
  };
  CatalogueWork work{};
  work.width = width;
  work.weights_row = row;
  work.panels = take(width * args.dim);
  work.weights = take(block * row);
  work.scaled = take(block * args.dim);
  work.adjusted = take(width);
  work.factors = take(block);
  parallel_for(panels, threads, [&](int64_t panel) { kernels.pack(args, work, panel); });
  for (int64_t first = 0; first < args.rows; first += block) {
    const int64_t rows = std::min(block, args.rows - first);
    for_runs(rows, run, threads,
             [&](int64_t at, int64_t count) { kernels.rows(args, results, work, first + at, at, count); });
    if (!results.grad_table && !results.grad_bias) continue;
    for_runs(args.items, kRunColumns, threads, [&](int64_t column, int64_t count) {
      kernels.columns(args, results, work, column, count, rows, first > 0);
    });
  }
}

}  // namespace pcl
