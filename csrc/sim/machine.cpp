#include "sim/machine.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <utility>

namespace sim {
namespace {

constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;

std::string text(Dim3 d) {
  std::string out = "(";
  out += std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
  return out;
}

Dim3 place(uint64_t number, Dim3 size) {
  return {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
          static_cast<unsigned>(number / size.x / size.y)};
}

}  // namespace

Machine& machine() {
  static Machine one;
  return one;
}

void Machine::set_order(const std::string& order) {
  reverse_ = order == "reverse";
  seed_ = 0;
  if (reverse_ || order == "forward") return;
  const bool digits = !order.empty() && order.find_first_not_of("0123456789") == std::string::npos;
  if (digits) seed_ = std::stoull(order);
  if (seed_ == 0) throw std::invalid_argument("order must be forward, reverse or a seed above 0, got '" + order + "'");
}

std::string Machine::thread_name(uint32_t number) const { return "thread " + text(threads_[number]->index); }

void Machine::fail(Where where, const std::string& what) const {
  throw Error(sim::text(where) + ": block " + text(block_) + " " + thread_name(current_->number) + ": " + what);
}

bool Machine::ordered(uint32_t thread, uint32_t clock) const {
  return current_->known != nullptr && (*current_->known)[thread] >= clock;
}

// ---- waiting and meeting ----

void Machine::wait(const char* name, Where where) {
  Thread& me = *current_;
  me.state = Thread::State::kWaiting;
  me.waits_for = name, me.waits_at = where;
  Fiber::switch_between(me.fiber, scheduler_);
}

void Machine::meet(uint32_t mask, const char* name, Where where, const void* in, void* out, Combine combine) {
  Thread& me = *current_;
  Warp& warp = *me.warp;
  if (!(mask >> me.lane & 1)) fail(where, std::string(name) + " by a lane that its mask does not name");
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const bool there = lane < static_cast<int>(warp.lanes.size());
    if (there && warp.lanes[lane]->state != Thread::State::kDone) continue;
    fail(where, std::string(name) + " names lane " + std::to_string(lane) + ", which " +
                    (there ? "has left the kernel" : "this warp does not have"));
  }
  auto& open = warp.open;
  auto meeting = std::find_if(open.begin(), open.end(), [&](const Rendezvous& r) { return (r.mask & mask) != 0; });
  if (meeting == open.end()) {
    open.push_back({name, where, mask, 0, {}, {}});
    meeting = std::prev(open.end());
  } else if (meeting->mask != mask || meeting->where != where || std::strcmp(meeting->name, name) != 0) {
    fail(where, std::string("warp diverged: this lane is at ") + name + ", others wait for it in " + meeting->name +
                    " at " + sim::text(meeting->where));
  }
  meeting->in[me.lane] = in, meeting->out[me.lane] = out;
  meeting->arrived |= 1u << me.lane;
  if (meeting->arrived != mask) return wait(name, where);
  combine(mask, meeting->in, meeting->out);
  open.erase(meeting);
  for (Thread* t : warp.lanes) {
    if ((mask >> t->lane & 1) && t != &me) t->state = Thread::State::kReady;
  }
  if (mask == kWholeWarp) warp.traffic.flush();
}

// Joins what the threads know; each of them then knows it all.
void Machine::join(const std::vector<Thread*>& threads, Clocks* joined) {
  joined->resize(num_threads_);
  for (Thread* t : threads) {
    if (t->known != nullptr) {
      for (uint32_t u = 0; u < num_threads_; ++u) (*joined)[u] = std::max((*joined)[u], (*t->known)[u]);
    }
    (*joined)[t->number] = t->clock;
  }
}

void Machine::order_warp(uint32_t mask, Where where) {
  meet(mask, "__syncwarp", where, nullptr, nullptr, [](uint32_t met, const void* const*, void* const*) {
    Machine& m = machine();
    std::vector<Thread*> lanes;
    for (Thread* t : m.current_->warp->lanes) {
      if (met >> t->lane & 1) lanes.push_back(t);
    }
    Clocks joined;
    m.join(lanes, &joined);
    const auto known = std::make_shared<const Clocks>(std::move(joined));
    for (Thread* t : lanes) t->known = known, ++t->clock;
  });
}

void Machine::block_barrier(Where where) {
  Barrier& b = block_barrier_;
  for (uint32_t i = 0; i < num_threads_; ++i) {
    if (threads_[i]->state != Thread::State::kDone) continue;
    fail(where, "divergent barrier: " + thread_name(i) + " has left the kernel");
  }
  if (b.arrived == 0) b.first = where;
  if (b.first != where) {
    fail(where, "divergent barrier: other threads wait in the one at " + sim::text(b.first));
  }
  if (++b.arrived < static_cast<int>(num_threads_)) return wait("a barrier of the block", where);
  b.arrived = 0;
  ++generation_;
  ++counters().barriers;
  for (uint32_t i = 0; i < num_threads_; ++i) {
    threads_[i]->known = nullptr;
    ++threads_[i]->clock;
    threads_[i]->state = Thread::State::kReady;
  }
  for (Warp& w : warps_) w.traffic.flush();
}

void Machine::named_barrier(int id, int count, bool wait_for_it, Where where) {
  if (id < 1 || id >= kNamedBarriers) fail(where, "named barrier must be 1 to 15, got " + std::to_string(id));
  if (count < kWarpSize || count % kWarpSize != 0) {
    fail(where, "a named barrier's count must be whole warps, got " + std::to_string(count));
  }
  Barrier& b = named_[id];
  if (b.arrived == 0) b.expected = count, b.first = where;
  if (b.expected != count) {
    fail(where, "named barrier " + std::to_string(id) + " expects " + std::to_string(count) + " threads here and " +
                    std::to_string(b.expected) + " at " + sim::text(b.first));
  }
  b.came.push_back(current_);
  join({current_}, &b.joined);
  ++current_->clock;
  if (wait_for_it) b.waiting.push_back(current_);
  if (++b.arrived < b.expected) {
    if (wait_for_it) wait("a named barrier", where);
    return;
  }
  const auto known = std::make_shared<const Clocks>(std::move(b.joined));
  for (Thread* t : b.waiting) {
    Clocks mine = *known;
    if (t->known != nullptr) {
      for (uint32_t u = 0; u < num_threads_; ++u) mine[u] = std::max(mine[u], (*t->known)[u]);
    }
    t->known = std::make_shared<const Clocks>(std::move(mine));
    t->state = Thread::State::kReady;
  }
  ++counters().barriers;
  b = Barrier{};
}

// ---- running ----

void Machine::enter() {
  Machine& m = machine();
  try {
    (*m.body_)();
    m.leave();
  } catch (...) {
    if (!m.error_) m.error_ = std::current_exception();
  }
  m.current_->state = Thread::State::kDone;
  Fiber::switch_between(m.current_->fiber, m.scheduler_);
  std::terminate();  // a fiber that is over is never resumed
}

// The current thread has run to the end of the kernel.
void Machine::leave() {
  for (const auto& group : current_->copies) {
    for (const AsyncCopy& c : group) fail(c.where, "leaves the kernel without waiting for this cp.async");
  }
  for (const Rendezvous& r : current_->warp->open) {
    if (r.mask >> current_->lane & 1) {
      fail(r.where, "leaves the kernel while other lanes wait for it in " + std::string(r.name));
    }
  }
  if (block_barrier_.arrived > 0) fail(block_barrier_.first, "divergent barrier: this thread leaves the kernel");
}

void Machine::prepare_block() {
  while (threads_.size() < num_threads_) threads_.push_back(std::make_unique<Thread>());
  warps_.clear();
  warps_.resize((num_threads_ + kWarpSize - 1) / kWarpSize);
  for (uint32_t i = 0; i < num_threads_; ++i) {
    Thread& t = *threads_[i];
    t.state = Thread::State::kReady;
    t.number = i, t.lane = static_cast<int>(i % kWarpSize), t.index = place(i, block_size_);
    t.clock = 1, t.known = nullptr;
    t.copies.assign(1, {});
    t.warp = &warps_[i / kWarpSize];
    t.warp->lanes.push_back(&t);
    t.fiber.start(&Machine::enter);
  }
  block_barrier_ = Barrier{};
  std::fill(std::begin(named_), std::end(named_), Barrier{});
  ++generation_;
}

// Runs what can run, each lane to its next collective; whether anything ran.
bool Machine::run_warp(Warp* warp, std::mt19937_64* random) {
  const auto lanes = warp->lanes.size();
  const size_t first = random != nullptr ? (*random)() % lanes : 0;
  bool ran = false;
  for (size_t i = 0; i < lanes && !error_; ++i) {
    Thread* t = warp->lanes[reverse_ ? lanes - 1 - i : (first + i) % lanes];
    if (t->state != Thread::State::kReady) continue;
    ran = true;
    current_ = t;
    Fiber::switch_between(scheduler_, t->fiber);
  }
  return ran;
}

void Machine::run_block(std::mt19937_64* random) {
  prepare_block();
  std::vector<Warp*> order;
  for (Warp& w : warps_) order.push_back(&w);
  if (reverse_) std::reverse(order.begin(), order.end());
  for (bool ran = true; ran && !error_;) {
    ran = false;
    if (random != nullptr) std::shuffle(order.begin(), order.end(), *random);
    for (Warp* w : order) {
      // A warp goes on as long as it can, or in a random order for a few turns.
      for (uint64_t turns = random != nullptr ? 1 + (*random)() % 8 : ~uint64_t{0}; turns > 0 && !error_; --turns) {
        if (!run_warp(w, random)) break;
        ran = true;
      }
    }
  }
  if (!error_) check_all_left();
  for (Warp& w : warps_) w.traffic.flush();
}

// Nothing can run: the block is over, or its threads wait for ever.
void Machine::check_all_left() const {
  const Thread* first = nullptr;
  int waiting = 0;
  for (uint32_t i = 0; i < num_threads_; ++i) {
    if (threads_[i]->state != Thread::State::kWaiting) continue;
    if (first == nullptr) first = threads_[i].get();
    ++waiting;
  }
  if (first == nullptr) return;
  std::string missing;
  for (const Rendezvous& r : first->warp->open) {
    for (const Thread* t : first->warp->lanes) {
      if (!(r.mask >> t->lane & 1) || (r.arrived >> t->lane & 1)) continue;
      if (!missing.empty()) break;
      missing =
          "; " + thread_name(t->number) + " is missing, it waits for " + t->waits_for + " at " + sim::text(t->waits_at);
    }
  }
  throw Error(sim::text(first->waits_at) + ": block " + text(block_) + " " + thread_name(first->number) +
              ": waits for ever for " + first->waits_for + ", as do " + std::to_string(waiting - 1) + " others" +
              missing);
}

void Machine::run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  grid_ = grid, block_size_ = block, body_ = &body, error_ = nullptr;
  num_threads_ = block.x * block.y * block.z;
  if (num_threads_ == 0 || num_threads_ > 1024) {
    throw std::invalid_argument("a block must have 1 to 1024 threads, got " + std::to_string(num_threads_));
  }
  new_launch();
  counters().launches.push_back({grid.x, grid.y, grid.z, num_threads_, static_cast<int64_t>(shared_bytes)});
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(last_block_only_ ? std::min<uint64_t>(blocks, 1) : blocks);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = reverse_ || last_block_only_ ? blocks - 1 - i : i;
  std::mt19937_64 random(seed_);
  if (seed_ != 0) std::shuffle(order.begin(), order.end(), random);
  for (uint64_t number : order) {
    block_ = place(number, grid);
    ++counters().blocks;
    new_shared_memory(shared_bytes);
    run_block(seed_ != 0 ? &random : nullptr);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

}  // namespace sim
