// device.h for a plain C++ compiler: the contracts are there.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../runtime.h"
#include "../scalars.h"
#include "block.h"

// CUDA's own words, which mean nothing here.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace pcl {

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void* /*stream*/,
           Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> values;
  };
  Call call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto body = [](void* argument) {
    auto* call = static_cast<Call*>(argument);
    std::apply(call->kernel, call->values);
  };
  return emulated::run({grid.x, grid.y, grid.z, threads, shared_bytes, body, &call});
}

inline int max_shared_bytes() {
  check_answer(emulated::answer());
  return emulated::shared_bytes();
}

template <class... Parameters>
int resident_blocks(void (*)(Parameters...), int, int) {
  check_answer(emulated::answer());
  return emulated::kMultiprocessors;
}

inline const char* error_text(int number) { return number == 0 ? "no error" : "invalid argument"; }

inline int thread_index() { return emulated::place().thread; }
inline int num_threads() { return emulated::place().threads; }
inline int block_x() { return static_cast<int>(emulated::place().block_x); }
inline int block_y() { return static_cast<int>(emulated::place().block_y); }
inline int block_z() { return static_cast<int>(emulated::place().block_z); }
inline int grid_x() { return static_cast<int>(emulated::place().grid_x); }
inline int grid_y() { return static_cast<int>(emulated::place().grid_y); }
inline int grid_z() { return static_cast<int>(emulated::place().grid_z); }

inline unsigned char* shared_memory() { return emulated::shared(); }

template <class Byte>
Byte* flip(Byte* shared, unsigned bits) {
  return reinterpret_cast<Byte*>(reinterpret_cast<uintptr_t>(shared) ^ bits);
}

// A collective knows the line it is called from, so that threads that meet in different places are found out.
inline void sync_threads(int line = __builtin_LINE()) { emulated::meet_block(line); }
inline void sync_warp(int line = __builtin_LINE()) { emulated::meet_warp("sync_warp", line, nullptr, nullptr); }

inline float exp2_approx(float x) { return std::exp2(x); }
inline float rounded_product(float x, float y) { return x * y; }
inline int only_now(int x) { return x; }
inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }

template <class Unit>
Unit load(const Unit* from) {
  return *from;
}

template <class Unit>
Unit load_once(const Unit* from) {
  return *from;
}

template <class Unit>
void store(Unit* to, const Unit& x) {
  *to = x;
}

template <class Unit>
void store_once(Unit* to, const Unit& x) {
  *to = x;
}

template <class T>
T round_to(float x);
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

template <>
inline bf16 round_to<bf16>(float x) {
  if (x != x) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>((uint64_t{bits} + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float to_float(fp16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float y;
  if (exponent == 31) {
    y = fraction ? NAN : INFINITY;
  } else {
    y = std::ldexp(static_cast<float>(exponent ? 1024 + fraction : fraction), (exponent ? exponent : 1) - 25);
  }
  return x.bits >> 15 ? -y : y;
}

template <>
inline fp16 round_to<fp16>(float x) {
  if (x != x) return {0x7fff};
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = size < 0x1p-14f ? -24 : exponent - 11;  // the value of the last place
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  // the leading 1 in steps, where there is one, is one more in the exponent; so is what rounding carries
  const int bits = ((unit + 24) << 10) + steps;
  return {static_cast<uint16_t>(sign | bits)};
}

template <class T>
uint32_t pack2(float low, float high) {
  return round_to<T>(low).bits | uint32_t{round_to<T>(high).bits} << 16;
}

template <class T>
void unpack2(uint32_t bits, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(bits)});
  high = to_float(T{static_cast<uint16_t>(bits >> 16)});
}

template <int kBytes>
void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 8 || kBytes == 16);
  emulated::copy_later(shared, valid ? global : nullptr, kBytes);
}

// Reads it, so that AddressSanitizer sees where it lies.
inline void prefetch(const void* global) { static_cast<void>(*static_cast<const volatile unsigned char*>(global)); }

inline void cp_async_commit() { emulated::commit_copies(); }

template <int kNewest>
void cp_async_wait() {
  emulated::wait_copies(kNewest);
}

}  // namespace pcl

#include "warp.h"
