#include "sim/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

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

#if defined(__x86_64__) && !UVG_SIM_UCONTEXT

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kStack);
}

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
  context_ = top;
}

void Fiber::switch_between(Fiber& from, Fiber& to) { sim_switch(&from.context_, to.context_); }

#else

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kStack);
  delete static_cast<ucontext_t*>(context_);
}

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = new_stack();
  if (context_ == nullptr) context_ = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(context_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

void Fiber::switch_between(Fiber& from, Fiber& to) {
  if (from.context_ == nullptr) from.context_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.context_), static_cast<ucontext_t*>(to.context_));
}

#endif

}  // namespace sim
