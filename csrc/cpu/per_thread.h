// How many threads a region has, and what each works in, made before the region starts: an exception inside would end
// the process.
#pragma once

#include "common/row_lists.h"
#include "common/threads.h"
#include "cpu/vec.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace uvg {
namespace UVG_ISA {

// Threads worth starting for so many rows.
inline int threads_for_rows(int threads, int64_t rows, int64_t width) {
  return rows * width <= kAloneRowValues ? 1 : threads;
}

// Threads worth starting for so many multiplications: waking many takes longer than waking one.
inline int threads_for_products(int threads, int64_t products) {
  return products <= kAloneProducts * threads ? 1 : threads;
}

// Room(scratch, arguments...) takes its memory of the scratch. It is first touched by the thread that works in it.
template <typename Room>
class PerThread {
 public:
  template <typename... Arguments>
  PerThread(Scratch& scratch, int threads, const Arguments&... arguments)
      : rooms_(reinterpret_cast<char*>(scratch.words(threads * kStride / 4))) {
    static_assert(__is_trivially_copyable(Room), "nothing is destroyed");
    for (int i = 0; i < threads; ++i) {
      const Room room(scratch, arguments...);
      std::memcpy(rooms_ + i * kStride, &room, sizeof room);
    }
  }

  // The room of the calling thread.
  Room& own() const {
#if defined(_OPENMP)
    const int number = omp_get_thread_num();
#else
    const int number = 0;
#endif
    return of(number);
  }

  Room& of(int64_t number) const { return *reinterpret_cast<Room*>(rooms_ + number * kStride); }

 private:
  static constexpr int64_t kStride = (int64_t{sizeof(Room)} + 63) / 64 * 64;  // no two on one cache line
  char* rooms_;
};

}  // namespace UVG_ISA
}  // namespace uvg
