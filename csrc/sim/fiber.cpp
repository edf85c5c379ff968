#include "sim/fiber.h"

#include <sys/mman.h>

#include <cstddef>
#include <new>

namespace sim {
namespace {

constexpr size_t kStack = 256 << 10, kGuard = 16 << 10;  // a kernel that overruns its stack faults in the guard

void* new_stack() {
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
  return stack;
}

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kStack);
}

#if defined(__x86_64__)

// Callee-saved registers go to the old stack and come from the new one.
extern "C" void sim_switch(void** from, void* to);
asm(R"(
.text
.type sim_switch, @function
sim_switch:
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
.size sim_switch, . - sim_switch
)");

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = new_stack();
  // Aligned as after a call: a return address (none), the entry that `ret` jumps to, six registers.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::switch_between(Fiber& from, Fiber& to) { sim_switch(&from.stack_pointer_, to.stack_pointer_); }

#else

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = new_stack();
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStack;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_between(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

#endif

}  // namespace sim
