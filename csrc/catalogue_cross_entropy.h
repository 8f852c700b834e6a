// catalogue_cross_entropy: for each of many rows a softmax over a catalogue, its loss and its gradients, in blocks of
// rows: scores of all rows and items are never held.
//
//   queries   [T, D]  contiguous, D a multiple of 16
//   table     [C, D]  contiguous
//   bias      [C]
//   target    [T]     int64, a column each
//   log_expected [C]  null for none: taken off every score but that of the row's target
//   seen, seen_first  null for none. seen [T]: columns, -1 for none; row r does not choose among seen[seen_first[r] .. r]
//   older, older_offsets, older_user  null for none. older: columns, -1 for none; nor does it choose among
//             older[older_offsets[u] .. older_offsets[u + 1] - 1] of its user u = older_user[r]
// Scores are queries table^T + bias. losses [T] = log sum exp(scores) - score of the target; the gradients are those of
// share * sum(losses): grad_queries [T, D], grad_table [C, D], grad_bias [C], null where not wanted.
// Sums are taken in an order that does not depend on the number of threads: the same bits for any. The caller has
// checked shapes, dtypes, strides and values; T and C are at least 1.
#pragma once

#include <cstdint>

#include "isa.h"

namespace pcl {

struct CatalogueArgs {
  const float *queries, *table, *bias;
  const int64_t* target;
  const float* log_expected;
  const int64_t *seen, *seen_first;
  const int64_t *older, *older_offsets, *older_user;
  int64_t rows, items, dim;
  float share;
};

struct CatalogueResults {
  float *losses, *grad_queries, *grad_table, *grad_bias;
};

void catalogue_cross_entropy_cpu(const CatalogueArgs& args, const CatalogueResults& results, Isa isa, int threads);

}  // namespace pcl
