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

// Weights 2^(factor * x) of x up to 0, in bfloat16, 32 at a time; 0 for whatever is below 2^-127. In whole numbers, 512
// to a power of two: n = 512 (127 + factor * x), of whose fraction f = n mod 512 / 512 what 1 + f is above 2^f is taken
// off, close to f (1 - f) (0.305 + 0.078 f), and the rest is rounded to bfloat16's 128 to a power of two. Relative error
// 0.53 % at most, 0.20 % in the mean square, where rounding alone makes 0.39 and 0.165.
class WeightScale {
 public:
  explicit WeightScale(float factor) {
    factor = factor < 1e-36f ? 1e-36f : factor;  // -127 is the factor times a number
    factor_ = Wide::fill(512 * factor);
    low_ = Wide::fill(-127 / factor);
  }

  // first and second: what 16 scores and the 16 after them are above the largest. Bits of what is not a number are
  // added to `seen`, for is_nan.
  HalfPairs operator()(Floats first, Floats second, Pairs& seen) const {
    const Pairs low = whole(first), high = whole(second);
    seen |= low | high;
    const __m512i n =
        _mm512_mask_blend_epi16(0xaaaaaaaa, reinterpret_cast<__m512i>(low), reinterpret_cast<__m512i>(high << 16));
    const __m512i f = _mm512_slli_epi16(n, 7), rest = _mm512_xor_si512(f, _mm512_set1_epi16(-1));
    const __m512i slope = _mm512_add_epi16(_mm512_mulhi_epu16(f, _mm512_set1_epi16(20)), _mm512_set1_epi16(78));
    const __m512i off = _mm512_mulhrs_epi16(_mm512_mulhi_epu16(f, rest), slope);
    const __m512i sum = _mm512_add_epi16(_mm512_sub_epi16(n, off), _mm512_set1_epi16(2));
    const HalfPairs apart = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                             1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const __m512i turn = reinterpret_cast<__m512i>(apart);
    return reinterpret_cast<HalfPairs>(_mm512_permutexvar_epi16(turn, _mm512_srli_epi16(sum, 2)));
  }

  // Numbers, shifted as below, lie between 2^23 and 2^24: the last bit of their exponent is 0.
  static bool is_nan(Pairs seen) {
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(seen), _mm512_set1_epi32(1 << 23)) != 0;
  }

 private:
  // n in the last 16 bits: adding 1.5 * 2^23 rounds to whole numbers.
  Pairs whole(Floats x) const {
    x = low_ > x ? low_ : x;  // x if it is not a number
    return reinterpret_cast<Pairs>(x * factor_ + (12582912.0f + 512 * 127));
  }

  Floats factor_, low_;
};

}  // namespace
}  // namespace pcl
