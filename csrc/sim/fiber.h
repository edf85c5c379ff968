// A stack of its own and a switch between two of them. x86-64: 15 lines of assembly; elsewhere ucontext.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sim {

class Fiber {
 public:
  Fiber() = default;  // without a stack: stands for the code that calls `resume`
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls `entry`, which must never return. May be called again once that is over.
  void start(void (*entry)());

  static void switch_between(Fiber& from, Fiber& to);

 private:
  void* stack_ = nullptr;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace sim
