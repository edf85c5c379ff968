// Rows of each sample in the order of its spans, and those of none; memory on cache lines of its own.
#include "common/row_lists.h"

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "tests/check.h"

namespace {

int64_t live = 0, left = -1;  // pieces of memory in use; how many more there are, -1 for any number

std::vector<int32_t> list(const uvg::RowLists& lists, int64_t number) {
  return {lists.rows(number), lists.rows(number) + lists.size(number)};
}

bool refused(std::vector<int32_t> spans, int64_t rows) {
  try {
    uvg::RowLists(spans.data(), 1, static_cast<int64_t>(spans.size() / 2), rows);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

// Whatever allocation fails, nothing is kept.
bool leaks(const std::vector<int32_t>& spans, int64_t rows) {
  for (int64_t allowed = 0;; ++allowed) {
    const int64_t before = live;
    left = allowed;
    try {
      const uvg::RowLists lists(spans.data(), 1, static_cast<int64_t>(spans.size() / 2), rows);
      left = -1;
      return false;
    } catch (const std::bad_alloc&) {
      left = -1;
      if (live != before) return true;
    }
  }
}

}  // namespace

void* operator new(size_t size) {
  void* memory = left == 0 ? nullptr : std::malloc(size + 1);
  if (memory == nullptr) throw std::bad_alloc();
  if (left > 0) --left;
  ++live;
  return memory;
}

void operator delete(void* memory) noexcept {
  if (memory != nullptr) --live;
  std::free(memory);
}

void operator delete(void* memory, size_t) noexcept { operator delete(memory); }

int main() {
  using Rows = std::vector<int32_t>;
  const std::vector<int32_t> spans = {6, 2, 0, 2, 3,  1,
                                      0, 0, 9, 0, 99, 0};  // three samples of two; empty ones anywhere
  const uvg::RowLists lists(spans.data(), 3, 2, 9);
  CHECK(lists.samples() == 3 && lists.longest() == 4 && !lists.shared());
  CHECK(list(lists, 0) == Rows({6, 7, 0, 1}));
  CHECK(list(lists, 1) == Rows({3}));
  CHECK(list(lists, 2).empty());
  CHECK(list(lists, 3) == Rows({2, 4, 5, 8}));

  const std::vector<int32_t> common = {0, 3, 2, 3};
  CHECK(uvg::RowLists(common.data(), 2, 1, 5).shared());
  CHECK(uvg::RowLists(common.data(), 1, 2, 5).shared());
  const std::vector<int32_t> three{4, 3, 0, 2, 6, 2, 2, 1};  // the first and the third have row 6
  const uvg::RowLists some(three.data(), 4, 1, 9);
  CHECK(some.shared() && some.shares(0) && !some.shares(1) && some.shares(2) && !some.shares(3) && !some.shares(4));
  CHECK(uvg::RowLists(nullptr, 0, 0, 2).size(0) == 2);
  const uvg::RowLists two(common.data(), 2, 1, 7);
  CHECK(list(two, 0) == Rows({0, 1, 2}) && list(two, 1) == Rows({2, 3, 4}) && list(two, 2) == Rows({5, 6}));
  const std::vector<int32_t> rising = {1, 2, 3, 0, 4, 1, 0, 0};  // gaps before, between and after
  const uvg::RowLists gaps(rising.data(), 2, 2, 7);
  CHECK(list(gaps, 0) == Rows({1, 2}) && list(gaps, 1) == Rows({4}) && list(gaps, 2) == Rows({0, 3, 5, 6}));
  CHECK(gaps.longest() == 2 && !gaps.shared());

  CHECK(refused({0, 6}, 5));
  CHECK(refused({-1, 2}, 5));
  CHECK(refused({0, -2}, 5));
  CHECK(!refused({3, 2}, 5));
  CHECK(refused({3, 2}, int64_t{1} << 31));  // a list holds 32 bits of a row

  CHECK(!leaks({3, 2}, 9));
  CHECK(!leaks({3, 2, 0, 4}, 9));

  uvg::Scratch scratch;
  for (int64_t count : {1, 0, 1000}) {
    uint32_t* words = scratch.words(count);
    CHECK(reinterpret_cast<uintptr_t>(words) % 64 == 0);
    for (int64_t i = 0; i < count; ++i) words[i] = 7;
  }
  CHECK(reinterpret_cast<uintptr_t>(scratch.floats(3)) % 64 == 0);

  for (int round = 0; round < 2; ++round) {  // pieces of one memory and larger ones: none reaches into another
    uvg::Scratch many;
    std::vector<std::pair<uint32_t*, int64_t>> pieces;
    for (int64_t count : {5, 12000, 30, 40000, 16, 12289, 12288, 3}) {
      uint32_t* words = many.words(count);
      CHECK(reinterpret_cast<uintptr_t>(words) % 64 == 0);
      for (int64_t i = 0; i < count; ++i) words[i] = static_cast<uint32_t>(count);
      pieces.emplace_back(words, count);
    }
    for (const auto& [words, count] : pieces)
      for (int64_t i = 0; i < count; ++i) CHECK(words[i] == static_cast<uint32_t>(count));
  }
  return uvg::test::finish("row_lists");
}
