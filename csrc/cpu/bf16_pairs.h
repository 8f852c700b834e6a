// bfloat16 in pairs: two neighbours along the summed dimension in 32 bits, as the matrix units of processors read them.
// Rows that are contiguous along that dimension are pairs as they lie; what runs across it is transposed or interleaved
// here. Vectors hold 16 lanes of 32 bits on every machine: processors without such vectors take several instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "scalar.h"
#include "simd.h"

namespace pcl {
namespace {

using Wide = Simd<float, 64, 6, 4>;
using Floats = Wide::V;
typedef uint16_t Halves __attribute__((vector_size(32)));     // 16 bfloat16
typedef uint16_t HalfPairs __attribute__((vector_size(64)));  // 16 pairs
typedef uint32_t Pairs __attribute__((vector_size(64)));      // the same
typedef uint32_t LoosePairs __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int64_t kLanes = 16;
constexpr int64_t kRowPad = 32;  // packed rows are padded to this many elements, two vectors or one tile of pairs

inline Pairs load_pairs(const uint32_t* p) { return *reinterpret_cast<const LoosePairs*>(p); }
inline void store_pairs(uint32_t* p, Pairs v) { *reinterpret_cast<LoosePairs*>(p) = v; }
inline void store_halves(uint16_t* p, Halves v) { *reinterpret_cast<LooseHalves*>(p) = v; }

// 2^x for x up to 127; 2^-126 for whatever is below, anything above. Relative error 1e-7.
inline Floats exp2_v(Floats x) {
  const Floats low = Wide::fill(-126.0f), magic = Wide::fill(12582912.0f);  // 1.5 * 2^23 rounds to integers
  x = x < low ? low : x;
  const Floats shifted = x + magic;
  const Floats r = x - (shifted - magic);
  Floats p = Wide::fill(1.326472731e-3f);
  p = p * r + 9.671512991e-3f;
  p = p * r + 5.550733581e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
  return reinterpret_cast<Floats>(reinterpret_cast<Pairs>(p) + (reinterpret_cast<Pairs>(shifted) << 23));
}

static constexpr inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static constexpr inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace pcl

#if defined(__AVX512BF16__)
#include "bf16_pairs_avx512bf16.h"
#else
namespace pcl {
namespace {

// Rounds to nearest, ties to even.
inline Halves narrow(Floats x) {
  Halves halves;
  for (int i = 0; i < kLanes; ++i) {
    Bfloat16 half;
    narrow(x[i], &half);
    halves[i] = half.bits;
  }
  return halves;
}

// Lane i of the result is the pair (first[i], second[i]), rounded.
inline Pairs narrow_pairs(Floats first, Floats second) {
  const Halves low = narrow(first), high = narrow(second);
  Pairs pairs;
  for (int i = 0; i < kLanes; ++i) pairs[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
  return pairs;
}

// sums + the products of both halves of every pair.
inline Floats dot_pairs(Floats sums, Pairs a, Pairs b) {
  const Pairs high = Pairs{} + 0xffff0000u;
  sums += reinterpret_cast<Floats>(a & high) * reinterpret_cast<Floats>(b & high);
  return sums + reinterpret_cast<Floats>(a << 16) * reinterpret_cast<Floats>(b << 16);
}

// Weights 2^(factor * x) of x up to 0, in bfloat16, 32 at a time; 0 for whatever is below 2^-126.
class WeightScale {
 public:
  explicit WeightScale(float factor) : factor_(Wide::fill(factor < 1e-36f ? 1e-36f : factor)) {}

  HalfPairs operator()(Floats first, Floats second, Pairs&) const {
    const auto weights_of = [this](Floats x) {
      x *= factor_;
      return narrow(x < -126.0f ? Floats{} : exp2_v(x));
    };
    const Halves low = weights_of(first), high = weights_of(second);
    HalfPairs weights;
    std::memcpy(&weights, &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&weights) + sizeof low, &high, sizeof high);
    return weights;
  }

  static bool is_nan(Pairs) { return false; }  // weights and their sum are not a number themselves

 private:
  Floats factor_;
};

}  // namespace
}  // namespace pcl
#endif

namespace pcl {
namespace {

// Rows of pairs: `stride` pairs from one to the next.
struct PairRows {
  const uint32_t* data;
  int64_t stride;
};

// A copy of rows, padded with 0 to `wide` elements.
inline PairRows copy_pairs(const Bfloat16* from, int64_t from_row, int64_t rows, int64_t dim, int64_t wide,
                           uint32_t* to) {
  const int64_t stride = wide / 2;
  for (int64_t i = 0; i < rows; ++i) {
    if (dim == wide) {
      for (int64_t c = 0; c < stride; c += kLanes) {
        Pairs vector;
        std::memcpy(&vector, from + i * from_row + 2 * c, sizeof vector);
        store_pairs(to + i * stride + c, vector);
      }
      continue;
    }
    std::memcpy(to + i * stride, from + i * from_row, dim * sizeof *from);
    std::memset(reinterpret_cast<char*>(to + i * stride) + dim * sizeof *from, 0, (wide - dim) * sizeof *from);
  }
  return {to, stride};
}

// The rows themselves where their width and place allow, else a copy.
inline PairRows as_pairs(const Bfloat16* from, int64_t from_row, int64_t rows, int64_t dim, int64_t wide,
                         uint32_t* scratch) {
  const bool whole = reinterpret_cast<uintptr_t>(from) % sizeof(uint32_t) == 0 && from_row % 2 == 0;
  if (dim == wide && whole) return {reinterpret_cast<const uint32_t*>(from), from_row / 2};
  return copy_pairs(from, from_row, rows, dim, wide, scratch);
}

// to[(i / 16) * 16 * pairs + k * 16 + i % 16] = pair k of row i, for k < pairs, a multiple of 16: panels of 16 rows
// turned into columns; 0 for rows that fill up the last panel.
inline void to_panels(PairRows from, int64_t rows, int64_t pairs, uint32_t* to) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const float* panel = reinterpret_cast<const float*>(from.data + i * from.stride);
    transpose<Wide>(panel, from.stride, least(rows - i, kLanes), pairs, reinterpret_cast<float*>(to + i * pairs),
                    kLanes);
  }
}

template <int kHalf, int... kIndex>
inline HalfPairs zip(HalfPairs a, HalfPairs b, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (kHalf * 16 + kIndex / 2 + kIndex % 2 * 32)...);
#else
  return __builtin_shuffle(a, b, HalfPairs{(kHalf * 16 + kIndex / 2 + kIndex % 2 * 32)...});
#endif
}

// to[(i / 2) * wide + c] = the pair (row i, row i + 1) in column c < wide, for even i; 0 for the missing row of an odd
// number, and for the pairs that fill up `padded` rows.
inline void to_row_pairs(PairRows from, int64_t rows, int64_t padded, int64_t wide, uint32_t* to) {
  using Lanes = std::make_integer_sequence<int, 32>;
  for (int64_t i = 0; i < rows; i += 2, to += wide) {
    const uint32_t *first = from.data + i * from.stride, *second = first + from.stride;
    for (int64_t c = 0; c < wide; c += 2 * kLanes) {
      const auto a = reinterpret_cast<HalfPairs>(load_pairs(first + c / 2));
      const auto b = i + 1 < rows ? reinterpret_cast<HalfPairs>(load_pairs(second + c / 2)) : HalfPairs{};
      store_pairs(to + c, reinterpret_cast<Pairs>(zip<0>(a, b, Lanes{})));
      store_pairs(to + c + kLanes, reinterpret_cast<Pairs>(zip<1>(a, b, Lanes{})));
    }
  }
  const int64_t filled = round_up(rows, 2);
  if (filled < padded) std::memset(to, 0, (padded - filled) / 2 * wide * sizeof *to);
}

// Stores the first `count` of 16 results, rounded.
inline void store_narrow(Bfloat16* to, Floats x, int64_t count) {
  const Halves halves = narrow(x);
  if (count >= kLanes) {
    store_halves(reinterpret_cast<uint16_t*>(to), halves);
  } else {
    std::memcpy(to, &halves, count * sizeof *to);
  }
}

}  // namespace
}  // namespace pcl
