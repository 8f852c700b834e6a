// What AVX512_BF16 does with pairs; bf16_pairs.h has the same in plain C++. Included there alone.
#pragma once

#include <immintrin.h>

namespace pcl {
namespace {

// Rounds to nearest, ties to even.
inline Halves narrow(Floats x) { return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))); }

// Lane i of the result is the pair (first[i], second[i]), rounded.
inline Pairs narrow_pairs(Floats first, Floats second) {
  const auto both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
  const HalfPairs turn = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<Pairs>(
      _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(turn), reinterpret_cast<__m512i>(both)));
}

// sums + the products of both halves of every pair.
inline Floats dot_pairs(Floats sums, Pairs a, Pairs b) {
  return reinterpret_cast<Floats>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

}  // namespace
}  // namespace pcl
