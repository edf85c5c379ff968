// Runs a kernel: blocks one after another, every CUDA thread of a block a fiber, switched at collectives only.
//
// What orders memory is followed exactly: each thread has a clock and knows the clocks of others up to the last barrier
// that it shared with them (vector clocks). A barrier of the whole block orders everything before it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "sim/fiber.h"
#include "sim/memory.h"
#include "sim/traffic.h"
#include "sim/where.h"

namespace sim {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kWarpSize = 32, kNamedBarriers = 16;
using Clocks = std::vector<uint32_t>;  // by thread of the block

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, source_bytes;  // what the source does not have is zero
  Where where;
};

struct Warp;

struct Thread {
  enum class State : uint8_t { kReady, kWaiting, kDone };

  Fiber fiber;
  State state;
  uint32_t number;  // in the block
  int lane;
  Warp* warp;
  Dim3 index;
  uint32_t clock;                       // ticks whenever the thread has synchronised with others
  std::shared_ptr<const Clocks> known;  // null: nothing but what a barrier of the block ordered
  const char* waits_for;
  Where waits_at;
  std::vector<std::vector<AsyncCopy>> copies;  // groups; the last one is open
};

// A collective some of whose lanes have come.
struct Rendezvous {
  const char* name;
  Where where;
  uint32_t mask, arrived;
  const void* in[kWarpSize];
  void* out[kWarpSize];
};

struct Warp {
  std::vector<Thread*> lanes;
  std::vector<Rendezvous> open;
  WarpTraffic traffic;
};

using Combine = void (*)(uint32_t mask, const void* const* in, void* const* out);

class Machine {
 public:
  // Runs body() as every thread of the grid. Throws Error at the first fault; the others of the launch are not run.
  void run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body);

  // "forward", "reverse", or the seed of a random order of blocks, warps and lanes. Throws std::invalid_argument.
  void set_order(const std::string& order);

  // Whether of every launch the last block runs alone: of grids and buffers too large to run whole.
  void set_last_block_only(bool only) { last_block_only_ = only; }

  // All lanes of `mask` meet; the last to come calls combine. Every lane must be at the same line.
  void meet(uint32_t mask, const char* name, Where where, const void* in, void* out, Combine combine);
  void order_warp(uint32_t mask, Where where);  // __syncwarp
  void block_barrier(Where where);              // __syncthreads
  void named_barrier(int id, int count, bool wait, Where where);

  Thread& thread() { return *current_; }
  Dim3 block_index() const { return block_; }
  Dim3 block_size() const { return block_size_; }
  Dim3 grid_size() const { return grid_; }
  uint32_t block_number() const { return block_.x + grid_.x * (block_.y + grid_.y * block_.z); }
  uint64_t generation() const { return generation_; }  // changes where all that was before is ordered before what comes
  bool ordered(uint32_t thread, uint32_t clock) const;  // before what the current thread does now

  std::string thread_name(uint32_t number) const;
  [[noreturn]] void fail(Where where, const std::string& what) const;

 private:
  struct Barrier {
    int expected = 0, arrived = 0;
    std::vector<Thread*> waiting, came;
    Clocks joined;
    Where first;
  };

  static void enter();
  void leave();
  void run_block(std::mt19937_64* random);
  void prepare_block();
  bool run_warp(Warp* warp, std::mt19937_64* random);
  void wait(const char* name, Where where);
  void join(const std::vector<Thread*>& threads, Clocks* joined);
  void check_all_left() const;

  Dim3 grid_, block_size_, block_;
  uint32_t num_threads_ = 0;
  uint64_t generation_ = 0;
  const std::function<void()>* body_ = nullptr;
  Fiber scheduler_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  Barrier block_barrier_, named_[kNamedBarriers];
  Thread* current_ = nullptr;
  std::exception_ptr error_;
  bool reverse_ = false, last_block_only_ = false;
  uint64_t seed_ = 0;  // 0: not random
};

Machine& machine();

}  // namespace sim
