#include "fiber.h"

#include <cstdint>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace pcl::emulated {

namespace {

// AddressSanitizer is told before and after every switch which stack is in use.
void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#endif
}

void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, stack, bytes);
#endif
}

}  // namespace

#ifdef __x86_64__

// Keeps what a called function must keep, on the old stack; its address goes to *save.
extern "C" void pcl_switch_stack(void** save, void* go_on);
asm(R"(
.text
.type pcl_switch_stack, @function
pcl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pcl_switch_stack, .-pcl_switch_stack
.type pcl_enter_stack, @function
pcl_enter_stack:
  movq %r12, %rdi
  call *%r13
  ud2
.size pcl_enter_stack, .-pcl_enter_stack
)");
extern "C" void pcl_enter_stack();

void Fiber::begin(void (*body)(void*), void* argument, unsigned char* stack, size_t stack_bytes) {
  body_ = body, argument_ = argument, stack_ = stack, stack_bytes_ = stack_bytes;
  inside_fake_ = nullptr;
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + stack_bytes) & ~uintptr_t{15});
  *--top = reinterpret_cast<void*>(&pcl_enter_stack);
  void* kept[] = {nullptr, nullptr, reinterpret_cast<void*>(&Fiber::enter), this, nullptr, nullptr};  // r15 .. rbp
  for (int i = 5; i >= 0; --i) *--top = kept[i];
  inside_ = top;
}

void Fiber::resume() {
  void* fake = nullptr;
  before_switch(&fake, stack_, stack_bytes_);
  pcl_switch_stack(&outside_, inside_);
  after_switch(fake, nullptr, nullptr);
}

void Fiber::stop() {
  before_switch(&inside_fake_, outside_stack_, outside_bytes_);
  pcl_switch_stack(&inside_, outside_);
  after_switch(inside_fake_, &outside_stack_, &outside_bytes_);
}

#else

void Fiber::begin(void (*body)(void*), void* argument, unsigned char* stack, size_t stack_bytes) {
  body_ = body, argument_ = argument, stack_ = stack, stack_bytes_ = stack_bytes;
  inside_fake_ = nullptr;
  inside_ = nullptr;
}

void Fiber::resume() {
  ucontext_t outside, first;
  outside_ = &outside;
  void* fake = nullptr;
  if (inside_ == nullptr) {
    getcontext(&first);
    first.uc_stack.ss_sp = stack_;
    first.uc_stack.ss_size = stack_bytes_;
    first.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(this);  // makecontext passes ints
    makecontext(&first, reinterpret_cast<void (*)()>(+[](unsigned high, unsigned low) {
      enter(reinterpret_cast<Fiber*>(uintptr_t{high} << 32 | low));
    }),
                2, static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
    inside_ = &first;
  }
  before_switch(&fake, stack_, stack_bytes_);
  swapcontext(&outside, static_cast<ucontext_t*>(inside_));
  after_switch(fake, nullptr, nullptr);
}

void Fiber::stop() {
  ucontext_t inside;
  inside_ = &inside;
  before_switch(&inside_fake_, outside_stack_, outside_bytes_);
  swapcontext(&inside, static_cast<ucontext_t*>(outside_));
  after_switch(inside_fake_, &outside_stack_, &outside_bytes_);
}

#endif

void Fiber::enter(Fiber* self) {
  after_switch(nullptr, &self->outside_stack_, &self->outside_bytes_);
  self->body_(self->argument_);
  self->stop();
  std::abort();  // resumed after its end
}

}  // namespace pcl::emulated
