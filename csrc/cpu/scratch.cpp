#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace pcl {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

void* scratch(int64_t bytes) {
  constexpr int64_t kLine = 64;
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(kLine, (bytes + kLine) / kLine * kLine));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

}  // namespace pcl
