// The work of one run of rows or columns, once per instruction set. See ../catalogue_cross_entropy.h for what is
// computed.
#pragma once

#include "catalogue_cross_entropy_tasks.h"
#include "simd.h"
#include "transpose.h"

namespace pcl {
namespace {

// As many columns as whole register tiles of a product hold, at most 64.
template <class S>
constexpr int64_t kPanel = 64 / (S::kLanes * S::kTileVecs) * (S::kLanes * S::kTileVecs);

constexpr int64_t kSumRows = 16;  // a sum over rows is one of sums over so many

template <class S>
void pack_panel(const CatalogueArgs& args, const CatalogueWork& work, int64_t panel) {
  const int64_t first = panel * kPanel<S>, dim = args.dim;
  const int64_t count = args.items - first < kPanel<S> ? args.items - first : kPanel<S>;
  float *to = work.panels + first * dim, *adjusted = work.adjusted + first;
  if (count < kPanel<S>) std::memset(to, 0, sizeof(float) * dim * kPanel<S>);
  for (int64_t i = 0; i < count; i += S::kLanes) {
    const float* from = args.table + (first + i) * dim;
    for (int64_t d = 0; d < dim; d += S::kLanes) {
      const int64_t some = count - i < S::kLanes ? count - i : S::kLanes;
      transpose_square<S>(from + d, dim, some, to + d * kPanel<S> + i, kPanel<S>);
    }
  }
  for (int64_t i = 0; i < kPanel<S>; ++i) {
    if (i >= count) {
      adjusted[i] = -__builtin_inff();
    } else {
      adjusted[i] = args.bias[first + i] - (args.log_expected ? args.log_expected[first + i] : 0.0f);
    }
  }
}

// Takes what row r does not choose among out of its scores.
inline void hide(const CatalogueArgs& args, int64_t r, float* scores) {
  const auto hide_all = [&](const int64_t* columns, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (columns[i] >= 0) scores[columns[i]] = -__builtin_inff();
    }
  };
  if (args.seen) hide_all(args.seen, args.seen_first[r], r + 1);
  if (args.older) {
    const int64_t* offsets = args.older_offsets + args.older_user[r];
    hide_all(args.older, offsets[0], offsets[1]);
  }
}

// Turns the products of row r with all items into weights; -> what makes gradients of them.
template <class S>
float softmax_row(const CatalogueArgs& args, int64_t r, const CatalogueWork& work, float* scores, float* loss) {
  using V = typename S::V;
  const int64_t target = args.target[r], width = work.width;
  hide(args, r, scores);
  const float own = scores[target] + args.bias[target];
  scores[target] = -__builtin_inff();
  V high = S::fill(-__builtin_inff());
  for (int64_t c = 0; c < width; c += S::kLanes) {
    const V x = S::load(scores + c) + S::load(work.adjusted + c);
    S::store(scores + c, x);
    high = x > high ? x : high;
  }
  const float others = S::max(high)[0], largest = others > own ? others : own;
  scores[target] = own;
  V total{};
  for (int64_t first = 0; first < width; first += kPanel<S>) {
    V some{};
    for (int64_t c = first; c < first + kPanel<S>; c += S::kLanes) {
      const V e = exp_v<S>(S::load(scores + c) - largest);
      S::store(scores + c, e);
      some += e;
    }
    total += some;
  }
  const float sum = S::sum(total)[0];
  scores[target] -= sum;
  *loss = __builtin_logf(sum) - (own - largest);
  return args.share / sum;
}

template <class S>
void catalogue_rows(const CatalogueArgs& args, const CatalogueResults& results, const CatalogueWork& work,
                    int64_t first, int64_t at, int64_t count) {
  const int64_t dim = args.dim, row = work.weights_row;
  const float* queries = args.queries + first * dim;
  float *weights = work.weights + at * row, *factors = work.factors + at;
  for (int64_t c = 0; c < args.items; c += kPanel<S>) {
    const Factor<float> pair{queries, work.panels + c * dim, kPanel<S>, dim};
    multiply<S>({dim, 1, row, 1, false}, &pair, 1, count, kPanel<S>, weights + c);
  }
  for (int64_t r = 0; r < count; ++r) {
    factors[r] = softmax_row<S>(args, first + r, work, weights + r * row, results.losses + first + r);
    for (int64_t d = 0; d < dim; ++d) work.scaled[(at + r) * dim + d] = factors[r] * queries[r * dim + d];
  }
  if (!results.grad_queries) return;
  const Factor<float> pair{weights, args.table, dim, args.items};
  multiply<S>({row, 1, dim, 1, false, factors}, &pair, 1, count, dim, results.grad_queries + first * dim);
}

template <class S>
void catalogue_columns(const CatalogueArgs& args, const CatalogueResults& results, const CatalogueWork& work,
                       int64_t first, int64_t count, int64_t rows, bool add) {
  using V = typename S::V;
  const int64_t dim = args.dim, row = work.weights_row;
  const float* weights = work.weights + first;
  if (results.grad_table) {
    const Factor<float> pair{weights, work.scaled, dim, rows};
    multiply<S>({1, row, dim, 1, add}, &pair, 1, count, dim, results.grad_table + first * dim);
  }
  for (int64_t c = 0; results.grad_bias && c < count; c += S::kLanes) {
    V sum{};
    for (int64_t begin = 0; begin < rows; begin += kSumRows) {
      const int64_t end = rows - begin < kSumRows ? rows : begin + kSumRows;
      V some{};
      for (int64_t r = begin; r < end; ++r) some += work.factors[r] * S::load(weights + r * row + c);
      sum += some;
    }
    for (int64_t i = 0; i < S::kLanes && c + i < count; ++i) {
      float* to = results.grad_bias + first + c + i;
      *to = add ? *to + sum[i] : sum[i];
    }
  }
}

template <class S>
CatalogueKernels catalogue_kernels_of() {
  return {kPanel<S>, pack_panel<S>, catalogue_rows<S>, catalogue_columns<S>};
}

}  // namespace
}  // namespace pcl
