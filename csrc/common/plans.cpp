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

RecentKeys::Record* RecentKeys::find(uint64_t hash) {
  const auto place = places_.find(hash);
  if (place == places_.end()) return nullptr;
  records_.splice(records_.begin(), records_, place->second);
  return &records_.front();
}

RecentKeys::Record& RecentKeys::get(uint64_t hash) {
  if (Record* known = find(hash)) return *known;
  if (records_.size() == kMost) {
    places_.erase(records_.back().hash);
    records_.pop_back();
  }
  records_.push_front({hash, false, {}});
  places_[hash] = records_.begin();
  return records_.front();
}

std::shared_ptr<const Plan> PlanTable::find(const Key& key, uint64_t hash, const std::byte* const* arguments,
                                            const std::vector<std::shared_ptr<const Plan>>& tried) {
  ++calls_;
  const auto found = entries_.find(hash);
  if (found == entries_.end()) return nullptr;
  Entry& entry = found->second;
  if (!std::equal(key.begin(), key.end(), entry.key.begin(), entry.key.end())) return nullptr;
  size_t at = entry.last < entry.plans.size() ? entry.last : 0;
  for (size_t i = 0; i < entry.plans.size(); ++i, at = at + 1 == entry.plans.size() ? 0 : at + 1) {
    Kept& kept = entry.plans[at];
    if (!kept.plan->fits(arguments) || std::find(tried.begin(), tried.end(), kept.plan) != tried.end()) continue;
    entry.last = at, kept.last = calls_;
    if (++kept.found == kPaid) recent_.get(hash).pace = {}, pace_ = {};  // they pay again
    return kept.plan;
  }
  return nullptr;
}

bool PlanTable::wanted(uint64_t hash) {
  RecentKeys::Record* known = recent_.find(hash);
  if (known == nullptr) {
    recent_.get(hash);
    return false;
  }
  if (known->refused || !known->pace.due()) return false;
  const auto entry = entries_.find(hash);
  if (entry != entries_.end() && entry->second.plans.size() >= kMostAlike) {
    return make_room(entry, std::next(entry), known->pace);
  }
  return size_ < kMost || (pace_.due() && make_room(entries_.begin(), entries_.end(), pace_));
}

// Drops the oldest plan of these entries if nobody used it lately: who takes turns with more plans than are kept would
// otherwise never use one. False where there is no room.
bool PlanTable::make_room(Entries::iterator begin, Entries::iterator end, RecentKeys::Pace& pace) {
  auto entry = begin;
  auto oldest = begin->second.plans.begin();
  for (auto each = begin; each != end; ++each) {
    auto& plans = each->second.plans;
    const auto kept = std::min_element(plans.begin(), plans.end(),
                                       [](const Kept& one, const Kept& other) { return one.last < other.last; });
    if (kept->last < oldest->last) entry = each, oldest = kept;
  }
  const bool idle = calls_ - oldest->last >= kIdle;
  pace.after_plan(idle && oldest->found >= kPaid, &pace == &pace_ ? kFullWait : RecentKeys::kMostWait);
  if (idle) erase(entry, oldest);
  return idle;
}

void PlanTable::add(const std::vector<int64_t>& key, uint64_t hash, std::shared_ptr<const Plan> plan) {
  if (size_ >= kMost) return;
  Entry& entry = entries_[hash];
  if (entry.plans.empty()) entry.key = key;
  if (entry.key != key) return;  // another key of this hash
  if (!entry.plans.empty()) recent_.get(hash).pace.after_plan(entry.plans.back().found > 0, kFullWait);
  entry.last = entry.plans.size();
  entry.plans.push_back({std::move(plan), calls_, 0});
  ++size_;
}

void PlanTable::drop(uint64_t hash, const Plan* plan) {
  const auto entry = entries_.find(hash);
  if (entry == entries_.end()) return;
  auto& plans = entry->second.plans;
  const auto kept = std::find_if(plans.begin(), plans.end(), [&](const Kept& each) { return each.plan.get() == plan; });
  if (kept == plans.end()) return;
  recent_.get(hash).pace.after_plan(kept->found >= kPaid);
  erase(entry, kept);
}

void PlanTable::erase(Entries::iterator entry, std::vector<Kept>::iterator kept) {
  entry->second.plans.erase(kept);
  if (entry->second.plans.empty()) entries_.erase(entry);
  --size_;
}

void PlanTable::clear() {
  entries_.clear(), recent_.clear();
  size_ = 0, calls_ = 0, pace_ = {};
}

}  // namespace uvg
