#include "scratch.h"

#include <new>

namespace pcl {

Memory allocate(int64_t bytes) {
  constexpr int64_t kLine = 64;
  void* memory = std::aligned_alloc(kLine, (bytes + kLine) / kLine * kLine);
  if (!memory) throw std::bad_alloc();
  return Memory(memory);
}

void* scratch(int64_t bytes) {
  constexpr int64_t kKept = 1 << 26;  // more is let go by the next call that needs less
  thread_local Memory memory;
  thread_local int64_t size = 0;
  if (bytes > size || (size > kKept && bytes <= kKept)) {
    memory.reset();
    size = 0;
    memory = allocate(bytes);
    size = bytes;
  }
  return memory.get();
}

}  // namespace pcl
