// Working memory, aligned to 64 bytes; what it holds at first is not said. Throws std::bad_alloc.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace pcl {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, FreeMemory>;

Memory allocate(int64_t bytes);

// A thread's own, of at least so many bytes. It is kept between calls: fresh pages cost as much as the work on them.
// What a rare long history takes, over 64 MB, is kept until the thread's next call that takes less.
void* scratch(int64_t bytes);

}  // namespace pcl
