// What one call did, to be done again on other addresses: kernels of the core with the numbers and addresses they got.
// No Python here; csrc/bindings_plans.cpp makes keys of calls and memory for results.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
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

// The plans of one function. Bounded: a caller with ever new keys neither fills memory nor makes plans all the time.
class PlanTable {
 public:
  static constexpr size_t kMost = 512;              // plans
  static constexpr size_t kMostAlike = 128;         // are made for a key: other numbers were read, other weights
  static constexpr uint64_t kPatience = 1'000'000;  // misses after which a full table starts anew

  [[nodiscard]] std::shared_ptr<const Plan> find(const Key& key, uint64_t hash, const std::byte* const* arguments);
  [[nodiscard]] bool wanted(uint64_t hash);  // after a miss: whether to make a plan, as the key was seen before
  void refuse(uint64_t hash) { refused_[hash % refused_.size()] = hash; }
  void add(const Key& key, uint64_t hash, std::shared_ptr<const Plan> plan);
  void drop(uint64_t hash, const Plan* plan);  // one that no longer does
  void clear();
  [[nodiscard]] size_t size() const { return size_; }

 private:
  struct Entry {
    std::vector<int64_t> key;
    std::vector<std::shared_ptr<const Plan>> plans;
    size_t made = 0;
  };
  std::unordered_map<uint64_t, Entry> entries_;
  std::array<uint64_t, 1024> seen_{}, refused_{};
  size_t size_ = 0;
  uint64_t misses_ = 0;
};

}  // namespace uvg
