// Products of a bfloat16 weight with blocks of rows (row_block.h), by an engine of bf16_product.h. Two neighbouring
// features of a row become a pair; features and depth are multiples of 32, and rows of the weight are aligned to pairs.
#pragma once

#include "bf16_product.h"
#include "row_block.h"

namespace pcl {
namespace {

template <class Engine>
struct PairWeights {
  using S = Wide;
  using A = float;
  using Operand = uint32_t;
  using Session = typename Engine::Session;
  static constexpr int64_t kWidth = kBlockRows<Wide>;

  // block [features][kWidth] -> pairs [features / 2][kWidth].
  static const uint32_t* prepare(const float* block, int64_t features, int64_t rows, uint32_t* to) {
    for (int64_t f = 0; f < features; f += 2) {
      const float* first = block + f * kWidth;
      for (int64_t r = 0; r < rows; r += kLanes) {
        store_pairs(to + f / 2 * kWidth + r, narrow_pairs(Wide::load(first + r), Wide::load(first + kWidth + r)));
      }
    }
    return to;
  }

  static void multiply(const Matrix& weight, int64_t first, int64_t count, int64_t column, int64_t depth,
                       const uint32_t* block, int64_t rows, bool add, float* to) {
    const Bfloat16* from = static_cast<const Bfloat16*>(weight.data) + first * weight.stride + column;
    const Left left{reinterpret_cast<const uint32_t*>(from), weight.stride / 2, 1};
    const auto at = [to](int64_t row, int64_t panel) { return to + row * kWidth + panel * kLanes; };
    const int64_t panels = (rows + kLanes - 1) / kLanes;
    if (add) {
      Engine::multiply(
          left, {block, kWidth, kLanes}, depth / 2, count, panels,
          [&](int64_t row, int64_t p, Floats sum) { Wide::store(at(row, p), Wide::load(at(row, p)) + sum); });
    } else {
      Engine::multiply(left, {block, kWidth, kLanes}, depth / 2, count, panels,
                       [&](int64_t row, int64_t p, Floats sum) { Wide::store(at(row, p), sum); });
    }
  }
};

}  // namespace
}  // namespace pcl
