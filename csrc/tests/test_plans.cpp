// Plans of calls: the same kernels on other addresses, found by their keys, a bounded number of them.
#include "common/plans.h"

#include <cstring>
#include <memory>

#include "tests/check.h"

namespace {

using uvg::Key, uvg::Memory, uvg::Place, uvg::Plan, uvg::PlanTable, uvg::Slot, uvg::Step;

// to[i] = from[i] * factor for so many values
void scale(const float* from, float* to, int64_t count, double factor) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * static_cast<float>(factor);
}

int64_t call_scale(void (*function)(), const Slot* slots) {
  const auto kernel = reinterpret_cast<void (*)(const float*, float*, int64_t, double)>(function);  // NOLINT
  kernel(reinterpret_cast<const float*>(slots[0].whole), reinterpret_cast<float*>(slots[1].whole),  // NOLINT
         slots[2].whole, slots[3].real);
  return 0;
}

int64_t call_first(void (*)(), const Slot* slots) {
  return static_cast<int64_t>(*reinterpret_cast<const float*>(slots[0].whole));  // NOLINT
}

Step scaling(Place from, Place to, double factor) {
  Step step;
  step.kernel = {call_scale, reinterpret_cast<void (*)()>(scale)};  // NOLINT
  step.slots.resize(4);
  step.slots[2].whole = 3, step.slots[3].real = factor;
  step.addresses = {{0, from}, {1, to}};
  return step;
}

std::byte* bytes(float* values) { return reinterpret_cast<std::byte*>(values); }  // NOLINT

void runs_on_other_addresses() {
  float fixed[3] = {1, 1, 1};
  Plan plan;
  plan.scratch_bytes = 128;
  const auto there = reinterpret_cast<int64_t>(fixed);  // NOLINT
  plan.steps.push_back(scaling({Place::Of::kArgument, 0, 4}, {Place::Of::kScratch, 0, 64}, 2));
  plan.steps.push_back(scaling({Place::Of::kScratch, 0, 64}, {Place::Of::kMade, 0, 0}, 10));
  plan.steps.push_back(scaling({Place::Of::kMade, 0, 0}, {Place::Of::kFixed, 0, there}, 1));
  Step asks;
  asks.kernel = {call_first, nullptr};
  asks.slots.resize(1), asks.addresses = {{0, {Place::Of::kArgument, 0, 0}}}, asks.asks = true, asks.answer = 7;
  plan.steps.push_back(asks);
  for (int round = 0; round < 2; ++round) {
    float given[4] = {7, 1.0F + static_cast<float>(round), 2, 3}, made[3] = {};
    const std::byte* argument = bytes(given);
    std::byte* result = bytes(made);
    CHECK(plan.run({&argument, &result, uvg::scratch_of_thread(plan.scratch_bytes)}));
    CHECK(made[0] == 20.0F + 20.0F * static_cast<float>(round) && made[2] == 60 && fixed[1] == 40);
    given[0] = 8;  // another answer
    CHECK(!plan.run({&argument, &result, uvg::scratch_of_thread(plan.scratch_bytes)}));
  }
  CHECK(reinterpret_cast<uintptr_t>(uvg::scratch_of_thread(1 << 16)) % 64 == 0);  // NOLINT
}

void more_slots_than_lie_on_the_stack() {
  Step step;
  step.kernel = {[](void (*)(), const Slot* slots) { return slots[299].whole; }, nullptr};
  step.slots.resize(300);
  step.slots[299].whole = 5, step.asks = true, step.answer = 5;
  Plan plan;
  plan.steps.push_back(step);
  CHECK(plan.run({nullptr, nullptr, nullptr}));
  plan.steps[0].answer = 6;
  CHECK(!plan.run({nullptr, nullptr, nullptr}));
}

void fits_what_was_read() {
  float values[2] = {1, 2}, other[2] = {1, 2};
  Plan plan;
  plan.values.push_back({0, std::vector<uint8_t>(8)});
  std::memcpy(plan.values[0].bytes.data(), values, 8);
  const std::byte *argument = bytes(values), *elsewhere = bytes(other);
  CHECK(plan.fits(&argument) && plan.fits(&elsewhere));
  other[1] = 3;
  CHECK(!plan.fits(&elsewhere));
  plan.places.emplace_back(0, argument);
  other[1] = 2;
  CHECK(plan.fits(&argument) && !plan.fits(&elsewhere));
}

Key key_of(int64_t word, const char* text) {
  Key key;
  key.add(word), key.add(text, std::strlen(text));
  return key;
}

void keys_are_compared_whole() {
  CHECK(key_of(1, "linear").hash() == key_of(1, "linear").hash());
  CHECK(key_of(1, "linear").hash() != key_of(2, "linear").hash());
  CHECK(key_of(1, "linear, of nine").hash() != key_of(1, "linear, of ten").hash());
  Key key;
  for (int i = 0; i < 384; ++i) key.add(i);
  CHECK(key.fits());
  key.add(0);
  CHECK(!key.fits());
  PlanTable table;
  const Key one = key_of(1, "a"), two = key_of(2, "a");
  table.add(one, 99, std::make_shared<Plan>());
  table.add(two, 99, std::make_shared<Plan>());  // the same hash: left out
  CHECK(table.size() == 1 && table.find(one, 99, nullptr) && !table.find(two, 99, nullptr));
}

void the_second_call_is_planned() {
  PlanTable table;
  CHECK(!table.wanted(5) && table.wanted(5) && table.wanted(5));
  table.refuse(5);
  CHECK(!table.wanted(5) && !table.wanted(6) && table.wanted(6));
}

void a_table_is_bounded() {
  PlanTable table;
  const Key key = key_of(1, "a");
  for (size_t i = 0; i < PlanTable::kMostAlike; ++i) {
    const auto plan = std::make_shared<Plan>();
    table.add(key, 1, plan);
    if (i % 2 == 0) table.drop(1, plan.get());
  }
  CHECK(table.size() == PlanTable::kMostAlike / 2);
  CHECK(!table.wanted(1) && !table.wanted(1));  // enough were made
  for (int64_t i = 2; table.size() < PlanTable::kMost; ++i) {
    const Key other = key_of(i, "a");
    table.add(other, other.hash(), std::make_shared<Plan>());
  }
  CHECK(!table.wanted(77) && !table.wanted(77));
  for (uint64_t i = 0; i <= PlanTable::kPatience; ++i) (void)table.find(key_of(-1, "b"), 3, nullptr);
  CHECK(table.wanted(77) && table.size() == 0);  // begins anew
}

}  // namespace

int main() {
  runs_on_other_addresses();
  more_slots_than_lie_on_the_stack();
  fits_what_was_read();
  keys_are_compared_whole();
  the_second_call_is_planned();
  a_table_is_bounded();
  return uvg::test::finish("plans");
}
