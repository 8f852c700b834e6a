// A function on a stack of its own, which can stop in the middle and go on later.
#pragma once

#include <cstddef>

namespace pcl::emulated {

class Fiber {
 public:
  // The stack belongs to the caller. body(argument) runs at the first resume().
  void begin(void (*body)(void*), void* argument, unsigned char* stack, size_t stack_bytes);
  // Run until the fiber stops or ends.
  void resume();
  // From inside: back to whoever resumed. A body that returns stops for good.
  void stop();

 private:
  static void enter(Fiber* self);

  void (*body_)(void*);
  void* argument_;
  unsigned char* stack_;
  size_t stack_bytes_;
  void *inside_, *outside_;  // what switch_stack or swapcontext goes on with
  void* inside_fake_;        // AddressSanitizer's shadow of the stacks, and where the outer one lies
  const void* outside_stack_;
  size_t outside_bytes_;
};

}  // namespace pcl::emulated
