// A thread's working memory, kept between calls while it is small: fresh pages cost as much as the work on them.
#pragma once

#include <cstdint>

namespace pcl {

// 64-byte aligned, of at least so many bytes; what it held before is gone. Throws std::bad_alloc.
void* scratch(int64_t bytes);

}  // namespace pcl
