// Two-byte floating point numbers as they lie in memory, and 16 bytes that move together. How to convert the numbers is
// up to nvidia.h and emulated/device.h.
#pragma once

#include <cstdint>

namespace pcl {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

struct alignas(16) Vec16 {
  uint32_t words[4];
};

}  // namespace pcl
