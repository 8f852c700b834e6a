// What one instruction set's copy of catalogue_cross_entropy offers. The driver shares the work out.
#pragma once

#include "../catalogue_cross_entropy.h"

namespace pcl {

// What the rows of one block share.
struct CatalogueWork {
  float* panels;    // the table transposed, [D][panel] for every `panel` columns, 0 past the last item
  float* adjusted;  // [columns of all panels] bias - log_expected, -infinity past the last item
  float*
      weights;  // [rows of a block] by weights_row: scores, then exp(score - largest), less the row's sum at its target
  int64_t width, weights_row;  // columns of all panels, and a little more: no power of two
  float* factors;              // [rows of a block], what makes gradients of weights: share / sum
  float* scaled;               // [rows of a block, D], queries times their factor
};

struct CatalogueKernels {
  int64_t panel;  // columns
  // One panel of `panels` and `adjusted`.
  void (*pack)(const CatalogueArgs& args, const CatalogueWork& work, int64_t panel);
  // Rows first .. first + count - 1, row `at` on of the block: their weights, losses and grad_queries.
  void (*rows)(const CatalogueArgs& args, const CatalogueResults& results, const CatalogueWork& work, int64_t first,
               int64_t at, int64_t count);
  // Columns first .. first + count - 1 of grad_table and grad_bias, of the block's `rows` rows; add: to what is there.
  void (*columns)(const CatalogueArgs& args, const CatalogueResults& results, const CatalogueWork& work, int64_t first,
                  int64_t count, int64_t rows, bool add);
};

CatalogueKernels catalogue_kernels_baseline();
CatalogueKernels catalogue_kernels_avx2();
CatalogueKernels catalogue_kernels_avx512();

}  // namespace pcl
