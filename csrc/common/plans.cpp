#include "common/plans.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace uvg {
namespace {

constexpr size_t kMostSlots = 96;
constexpr std::align_val_t kAlignment{64};

struct Scratch {
  std::byte* bytes = nullptr;
  int64_t size = 0;
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(bytes, kAlignment); }
};

std::byte* address(const Place& place, const Memory& memory) {
  switch (place.of) {
    case Place::Of::kArgument:
      return const_cast<std::byte*>(memory.arguments[place.index]) + place.offset;  // NOLINT: a kernel knows
    case Place::Of::kMade:
      return memory.made[place.index] + place.offset;
    case Place::Of::kScratch:
      return memory.scratch + place.offset;
    case Place::Of::kFixed:
      break;
  }
  return reinterpret_cast<std::byte*>(place.offset);  // NOLINT
}

}  // namespace

std::byte* scratch_of_thread(int64_t bytes) {
  thread_local Scratch scratch;
  if (bytes > scratch.size) {
    ::operator delete(scratch.bytes, kAlignment);
    scratch.bytes = nullptr, scratch.size = 0;  // should the next line throw
    scratch.bytes = static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), kAlignment));
    scratch.size = bytes;
  }
  return scratch.bytes;
}

bool Plan::fits(const std::byte* const* arguments) const {
  for (const auto& [argument, place] : places) {
    if (arguments[argument] != place) return false;
  }
  return std::all_of(values.begin(), values.end(), [&](const Values& read) {
    return read.bytes.empty() || std::memcmp(arguments[read.argument], read.bytes.data(), read.bytes.size()) == 0;
  });
}

bool Plan::run(const Memory& memory) const {
  std::vector<Slot> many;
  std::array<Slot, kMostSlots> few;  // NOLINT: written before it is read
  for (const Step& step : steps) {
    if (step.slots.size() > few.size()) many.resize(step.slots.size());
    Slot* slots = step.slots.size() > few.size() ? many.data() : few.data();
    std::copy(step.slots.begin(), step.slots.end(), slots);
    for (const auto& [slot, place] : step.addresses) {
      slots[slot].whole = reinterpret_cast<int64_t>(address(place, memory));  // NOLINT
    }
    const int64_t answer = step.kernel.call(step.kernel.function, slots);
    if (step.asks && answer != step.answer) return false;
  }
  return true;
}

void Key::add(const char* text, size_t length) {
  add(static_cast<int64_t>(length));
  for (size_t i = 0; i < length; i += sizeof(int64_t)) {
    int64_t word = 0;
    std::memcpy(&word, text + i, std::min(sizeof(word), length - i));
    add(word);
  }
}

uint64_t Key::hash() const {
  uint64_t hash = size_;
  for (int64_t word : *this) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15U;
    hash ^= hash >> 29U;
  }
  return hash;
}

std::shared_ptr<const Plan> PlanTable::find(const Key& key, uint64_t hash, const std::byte* const* arguments) {
  const auto found = entries_.find(hash);
  if (found != entries_.end() &&
      std::equal(key.begin(), key.end(), found->second.key.begin(), found->second.key.end())) {
    for (const auto& plan : found->second.plans) {
      if (plan->fits(arguments)) return plan;
    }
  }
  ++misses_;
  return nullptr;
}

bool PlanTable::wanted(uint64_t hash) {
  if (refused_[hash % refused_.size()] == hash) return false;
  uint64_t& seen = seen_[hash % seen_.size()];
  if (seen != hash) {
    seen = hash;
    return false;
  }
  if (size_ >= kMost && misses_ >= kPatience) clear();
  const auto found = entries_.find(hash);
  return size_ < kMost && (found == entries_.end() || found->second.made < kMostAlike);
}

void PlanTable::add(const Key& key, uint64_t hash, std::shared_ptr<const Plan> plan) {
  Entry& entry = entries_[hash];
  if (entry.made == 0) entry.key.assign(key.begin(), key.end());
  if (!std::equal(key.begin(), key.end(), entry.key.begin(), entry.key.end())) return;  // another key of this hash
  entry.plans.push_back(std::move(plan));
  ++entry.made, ++size_, misses_ = 0;
}

void PlanTable::drop(uint64_t hash, const Plan* plan) {
  const auto found = entries_.find(hash);
  if (found == entries_.end()) return;
  auto& plans = found->second.plans;
  const auto place = std::find_if(plans.begin(), plans.end(), [&](const auto& each) { return each.get() == plan; });
  if (place == plans.end()) return;
  plans.erase(place);
  --size_;
}

void PlanTable::clear() {
  entries_.clear();
  seen_.fill(0), refused_.fill(0);
  size_ = 0, misses_ = 0;
}

}  // namespace uvg
