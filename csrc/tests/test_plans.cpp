// Plans of calls: the same kernels on other addresses, found by their keys, a bounded number of them.
#include "common/plans.h"

#include <cstring>
#include <memory>
#include <vector>

#include "tests/check.h"

namespace {

using uvg::Key, uvg::Place, uvg::Plan, uvg::PlanTable, uvg::RecentKeys, uvg::Slot, uvg::Step;

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

std::vector<int64_t> words(const Key& key) { return {key.begin(), key.end()}; }

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
  table.add(words(one), 99, std::make_shared<Plan>());
  table.add(words(two), 99, std::make_shared<Plan>());  // the same hash: left out
  CHECK(table.size() == 1 && table.find(one, 99, nullptr, {}) && !table.find(two, 99, nullptr, {}));
}

void the_second_call_is_planned() {
  PlanTable table;
  CHECK(!table.wanted(5) && table.wanted(5) && table.wanted(5));
  table.refuse(5);
  CHECK(!table.wanted(5) && !table.wanted(6) && table.wanted(6));
  CHECK(!table.wanted(1024 + 6) && table.wanted(6) && table.wanted(1024 + 6));  // whatever slot they are in
  for (uint64_t i = 0; i < 2 * RecentKeys::kMost; ++i) (void)table.wanted(10'000 + i);
  CHECK(!table.wanted(6) && !table.wanted(5));  // forgotten
}

void a_plan_that_was_tried_is_not_found() {
  PlanTable table;
  const Key key = key_of(1, "a");
  table.add(words(key), 1, std::make_shared<Plan>()), table.add(words(key), 1, std::make_shared<Plan>());
  const auto first = table.find(key, 1, nullptr, {});
  CHECK(first == table.find(key, 1, nullptr, {}));  // again
  const auto second = table.find(key, 1, nullptr, {first});
  CHECK(second && second != first && table.find(key, 1, nullptr, {}) == second);
  CHECK(!table.find(key, 1, nullptr, {second, first}));
  table.drop(1, first.get()), table.drop(1, first.get());
  CHECK(table.size() == 1 && table.find(key, 1, nullptr, {}) == second);
  table.drop(1, second.get());
  CHECK(table.size() == 0 && !table.find(key, 1, nullptr, {}));
}

// Plans made in so many calls that each find a plan gone after it was used so many times.
int made_of(int calls, int uses) {
  PlanTable table;
  const Key key = key_of(1, "a");
  int made = 0;
  for (int i = 0; i < calls; ++i) {
    if (const auto plan = table.find(key, 1, nullptr, {})) {
      for (int use = 1; use < uses; ++use) (void)table.find(key, 1, nullptr, {});
      table.drop(1, plan.get());
      CHECK(!table.wanted(1));  // not at once
    } else if (table.wanted(1)) {
      table.add(words(key), 1, std::make_shared<Plan>()), ++made;
    }
  }
  return made;
}

void plans_that_do_not_pay_become_rare() {
  CHECK(made_of(3000, 1) < 16);
  CHECK(made_of(3000, PlanTable::kPaid) > 900);
}

struct Never : Plan {  // reads a number that no call has
  Never() { values.push_back({0, {1}}); }
};

void numbers_that_never_come_back_get_few_plans() {
  PlanTable table;
  const Key key = key_of(1, "a");
  const std::byte other{0};
  const std::byte* arguments[] = {&other};
  int made = 0;
  const auto call = [&](std::shared_ptr<const Plan> plan) {
    if (table.find(key, 1, arguments, {}) || !table.wanted(1)) return;
    table.add(words(key), 1, std::move(plan)), ++made;
  };
  for (int i = 0; i < 1000; ++i) call(std::make_shared<Never>());
  CHECK(made > 4 && made < 20);
  for (int i = 0; i < 400; ++i) call(std::make_shared<Plan>());
  CHECK(table.find(key, 1, arguments, {}));  // a number that stays has one
}

// So many plans of one key, or of a key each, all in use: used, one after the other, in each round.
void the_oldest_idle_plan_makes_room(bool alike) {
  PlanTable table;
  const size_t most = alike ? PlanTable::kMostAlike : PlanTable::kMost;
  const auto key = [&](size_t i) { return key_of(alike ? 1 : static_cast<int64_t>(i), "a"); };
  for (size_t i = 0; i < most; ++i) table.add(words(key(i)), key(i).hash(), std::make_shared<Plan>());
  CHECK(table.size() == most);
  const Key more = key(most);
  CHECK(!table.wanted(more.hash()));
  for (size_t i = 0; i < 100; ++i) CHECK(!table.wanted(more.hash()));  // nobody is idle
  const auto first = table.find(key(0), key(0).hash(), nullptr, {});
  for (size_t i = 0; i < PlanTable::kIdle; ++i) (void)table.find(key(0), key(0).hash(), nullptr, {});
  int asked = 0;
  while (!table.wanted(more.hash()) && asked < 5000) ++asked;
  CHECK(asked <= 2 * static_cast<int>(RecentKeys::kMostWait) && table.size() == most - 1);
  table.add(words(more), more.hash(), std::make_shared<Plan>());
  CHECK(table.size() == most && table.find(key(0), key(0).hash(), nullptr, {}) != nullptr);
  table.clear();
  CHECK(table.size() == 0 && !table.find(key(0), key(0).hash(), nullptr, {}));
}

}  // namespace

int main() {
  runs_on_other_addresses();
  more_slots_than_lie_on_the_stack();
  fits_what_was_read();
  keys_are_compared_whole();
  the_second_call_is_planned();
  a_plan_that_was_tried_is_not_found();
  plans_that_do_not_pay_become_rare();
  numbers_that_never_come_back_get_few_plans();
  the_oldest_idle_plan_makes_room(true);
  the_oldest_idle_plan_makes_room(false);
  return uvg::test::finish("plans");
}
