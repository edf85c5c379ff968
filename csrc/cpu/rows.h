// Rows in groups: what all rows of a group need is loaded once, and their sums run side by side, which hides the
// latency of an addition.
#pragma once

#include "common/row_chunks.h"
#include "cpu/vec.h"

namespace uvg {
namespace UVG_ISA {

constexpr int64_t kGroup = 4;  // fp32 norm backward, measured: 34 cycles for 16 values, 36 by two rows, 44 by one

template <int64_t kCount>
struct Count {
  static constexpr int64_t value = kCount;
  constexpr operator int64_t() const { return kCount; }
};

// body(Count<k>) for k from 0 to kCount - 1, written out: arrays with such indices live in registers.
template <int64_t kCount, typename Body>
UVG_INLINE void each(Body&& body) {
  if constexpr (kCount > 0) {
    each<kCount - 1>(body);
    body(Count<kCount - 1>{});
  }
}

// step(first row, Count<rows>) over a chunk: whole groups, then row by row. What a step makes of a row must not depend
// on the number of rows.
template <typename Step>
UVG_INLINE void by_groups(const RowChunk& chunk, Step&& step) {
  int64_t r = chunk.first;
  const int64_t end = r + chunk.rows;
  for (; r + kGroup <= end; r += kGroup) step(r, Count<kGroup>{});
  for (; r < end; ++r) step(r, Count<1>{});
}

// sums[k] = the total of term k over a row. terms(first column, columns, Vec[kSums]) gives the terms.
template <int64_t kSums, typename Terms>
UVG_INLINE void sum_columns(int64_t width, float (&sums)[kSums], Terms&& terms) {
  Vec totals[kSums] = {}, term[kSums];
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    terms(i, kLanes, term);
    each<kSums>([&](auto k) UVG_INLINED { totals[k] += term[k]; });
  }
  if (i < width) {
    terms(i, width - i, term);
    each<kSums>([&](auto k) UVG_INLINED { totals[k] += term[k]; });
  }
  each<kSums>([&](auto k) UVG_INLINED { sums[k] = sum(totals[k]); });
}

// Sum of term(first column, columns) over one row: four sums side by side.
template <typename Term>
UVG_INLINE float sum_row(int64_t width, Term&& term) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
    each<4>([&](auto k) UVG_INLINED { sums[k] += term(i + k * kLanes, kLanes); });
  for (; i < width; i += kLanes) sums[0] += term(i, width - i < kLanes ? width - i : kLanes);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Asks the second-level cache for columns i on of the group that follows one of kRows packed rows; beyond the end of
// an array it asks for nothing.
template <int64_t kRows, typename T>
UVG_INLINE void ask_ahead(const T* rows, int64_t width, int64_t i) {
  if (i * static_cast<int64_t>(sizeof(T)) % 64 != 0) return;  // once for a cache line
  each<kRows>([&](auto k) UVG_INLINED {
    __builtin_prefetch(rows + (kRows + k) * width + i, 0, 2);
    asm volatile("");  // g++ 12 drops calls of a function that does nothing but ask
  });
}

}  // namespace UVG_ISA
}  // namespace uvg
