// A stack of its own and a switch between two of them. x86-64: 15 lines of assembly; elsewhere, and with
// UVG_SIM_UCONTEXT, ucontext, whose every switch asks the kernel for the signal mask.
#pragma once

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
  void* context_ = nullptr;  // a stack pointer, or a ucontext_t of this fiber's own
};

}  // namespace sim
