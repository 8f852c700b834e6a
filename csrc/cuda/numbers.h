// Numbers of a dtype as they are added up: from and to units of memory, a Vec16 of several or a single one.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.h"
#include "isa.h"

namespace pcl {

// What numbers of type T are added in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T, class Unit>
inline constexpr int kNumbers = sizeof(Unit) / sizeof(T);

template <class T, class Unit>
__device__ __forceinline__ void widen(const Unit& unit, Sum<T> (&out)[kNumbers<T, Unit>]) {
  if constexpr (sizeof(T) == 2 && sizeof(Unit) == 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack2<T>(unit.words[i], out[2 * i], out[2 * i + 1]);
  } else if constexpr (sizeof(T) == 2) {
    out[0] = to_float(unit);
  } else {
    memcpy(out, &unit, sizeof(unit));
  }
}

template <class T, class Unit>
__device__ __forceinline__ Unit narrow(const Sum<T> (&numbers)[kNumbers<T, Unit>]) {
  Unit unit;
  if constexpr (sizeof(T) == 2 && sizeof(Unit) == 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) unit.words[i] = pack2<T>(numbers[2 * i], numbers[2 * i + 1]);
  } else if constexpr (sizeof(T) == 2) {
    unit = round_to<T>(numbers[0]);
  } else {
    memcpy(&unit, numbers, sizeof(unit));
  }
  return unit;
}

// Calls run(T{}) with the type of dtype.
template <class Run>
int with_type(Scalar dtype, Run run) {
  switch (dtype) {
    case Scalar::kDouble:
      return run(double{});
    case Scalar::kBfloat16:
      return run(bf16{});
    case Scalar::kHalf:
      return run(fp16{});
    default:
      return run(float{});
  }
}

}  // namespace pcl
