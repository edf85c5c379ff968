// What one call did, to be done again on other addresses: kernels of the core with the numbers and addresses they got.
// No Python here; csrc/bindings_plans.cpp makes keys of calls and memory for results.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <unordered_map>
#include <vector>

namespace uvg {

union Slot {  // one number that a kernel gets
  int64_t whole;
  double real;
};

struct Kernel {
  int64_t (*call)(void (*function)(), const Slot* slots);  // 0 from a kernel that returns nothing
  void (*function)();
};

// Where an address lies: so many bytes into memory that a call is given or makes.
struct Place {
  enum class Of : uint8_t { kArgument, kMade, kScratch, kFixed };
  Of of;
  int32_t index;   // of the argument or of what is made
  int64_t offset;  // from there, from the scratch or, of what is fixed, from 0
};

struct Step {
  Kernel kernel{};
  std::vector<Slot> slots;
  std::vector<std::pair<int32_t, Place>> addresses;  // slot and what to put there
  bool asks = false;                                 // its answer has to be the same again
  int64_t answer = 0;
};

struct Values {  // an argument whose numbers the call read
  int32_t argument;
  std::vector<uint8_t> bytes;
};

struct Memory {
  const std::byte* const* arguments;
  std::byte* const* made;
  std::byte* scratch;
};

struct Plan {
  std::vector<Values> values;
  std::vector<std::pair<int32_t, const std::byte*>> places;  // arguments that have to lie there
  std::vector<Step> steps;
  int64_t scratch_bytes = 0;

  virtual ~Plan() = default;
  [[nodiscard]] bool fits(const std::byte* const* arguments) const;  // whether they are those that it was made for
  [[nodiscard]] bool run(const Memory& memory) const;                // false where a question has another answer now
};

// Memory of this thread, aligned to 64 bytes. Valid until the thread asks for more.
std::byte* scratch_of_thread(int64_t bytes);

// What a call is known by, as words: compared whole.
class Key {
 public:
  void add(int64_t word) {
    if (size_ < words_.size()) words_[size_] = word;
    ++size_;
  }
  void add(const char* text, size_t length);
  [[nodiscard]] bool fits() const { return size_ <= words_.size(); }
  [[nodiscard]] uint64_t hash() const;
  [[nodiscard]] const int64_t* begin() const { return words_.data(); }
  [[nodiscard]] const int64_t* end() const { return words_.data() + size_; }

 private:
  size_t size_ = 0;
  std::array<int64_t, 384> words_;  // NOLINT: written before it is read
};

// What was done with the keys that found no plan lately, by their hashes; the least recent are forgotten.
class RecentKeys {
 public:
  static constexpr size_t kMost = 1024;
  static constexpr uint32_t kMostWait = 1024;

  struct Pace {  // how soon there may be a plan again where plans did not pay
    uint32_t misses = 0, wait = 0;
    bool due() { return ++misses > wait; }
    void after_plan(bool paid, uint32_t most = kMostWait) {
      misses = 0, wait = paid ? 1 : std::min(std::max(2 * wait, 1U), most);
    }
  };
  struct Record {
    uint64_t hash;
    bool refused = false;
    Pace pace;
  };
  Record* find(uint64_t hash);  // null where there is none
  Record& get(uint64_t hash);
  void clear() { places_.clear(), records_.clear(); }

 private:
  std::list<Record> records_;  // the most recent first
  std::unordered_map<uint64_t, std::list<Record>::iterator> places_;
};

// The plans of one function. Bounded: a caller with ever new keys neither fills memory nor makes plans all the time.
class PlanTable {
 public:
  static constexpr size_t kMost = 512;        // plans that are kept
  static constexpr size_t kMostAlike = 128;   // of them for one key: other numbers, other weights, other answers
  static constexpr uint64_t kIdle = 1024;     // calls without a plan before another may have its place
  static constexpr uint32_t kPaid = 16;       // calls by a plan that pay for making it
  static constexpr uint32_t kFullWait = 128;  // misses at most: of a full table, of a key whose plans nobody used

  // A plan that fits and is none of those tried.
  [[nodiscard]] std::shared_ptr<const Plan> find(const Key& key, uint64_t hash, const std::byte* const* arguments,
                                                 const std::vector<std::shared_ptr<const Plan>>& tried);
  [[nodiscard]] bool wanted(uint64_t hash);  // after a miss: whether to make a plan, as the key was seen before
  void refuse(uint64_t hash) { recent_.get(hash).refused = true; }
  void add(const std::vector<int64_t>& key, uint64_t hash, std::shared_ptr<const Plan> plan);
  void drop(uint64_t hash, const Plan* plan);  // one that no longer does
  void clear();
  [[nodiscard]] size_t size() const { return size_; }

 private:
  struct Kept {
    std::shared_ptr<const Plan> plan;
    uint64_t last;   // call that found it
    uint32_t found;  // so many calls
  };
  struct Entry {
    std::vector<int64_t> key;
    std::vector<Kept> plans;
    size_t last = 0;  // found: the search begins there, as layers of one shape take turns
  };
  using Entries = std::unordered_map<uint64_t, Entry>;
  bool make_room(Entries::iterator begin, Entries::iterator end, RecentKeys::Pace& pace);
  void erase(Entries::iterator entry, std::vector<Kept>::iterator kept);

  Entries entries_;  // none of them empty
  RecentKeys recent_;
  RecentKeys::Pace pace_;  // of a full table
  size_t size_ = 0;
  uint64_t calls_ = 0;
};

}  // namespace uvg
