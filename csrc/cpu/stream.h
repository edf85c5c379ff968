// Stores past the cache, for results that are too large to be found there when they are read.
#pragma once

#include "cpu/rows.h"

namespace uvg {
namespace UVG_ISA {

#if defined(UVG_LARGE)  // the emulated build, whose arrays are small
constexpr int64_t kLarge = UVG_LARGE;
#else
constexpr int64_t kLarge = int64_t{1} << 23;  // bytes of one result; untuned
#endif

#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kInPairs = false;
template <>
constexpr bool kInPairs<BFloat16> = true;  // rounded two vectors at a time
#endif

// Where a kernel puts one of its results: [rows, width] at `data`. Past the cache, memory is not read before it is
// written; that asks for whole cache lines.
template <typename T>
class Target {
 public:
  Target(void* data, int64_t rows, int64_t width)
      : data_(static_cast<T*>(data)), width_(width), past_(is_past(data, rows, width)) {}

  bool past() const { return past_; }

  T* row(int64_t r) const { return data_ + r * width_; }

  UVG_INLINE void put(int64_t r, int64_t i, Vec v, int64_t n) const {
    T* p = row(r) + i;
#if defined(__AVX512F__)
    if (past_ && n >= kLanes) return stream(p, v);  // rope of odd heads puts value by value
#endif
    store(p, v, n);
  }

  // The same columns of kRows rows from r on.
  template <int64_t kRows>
  UVG_INLINE void put_rows(int64_t r, int64_t i, const Vec (&v)[kRows], int64_t n) const {
#if defined(__AVX512BF16__)
    if constexpr (kInPairs<T> && kRows % 2 == 0)
      if (n >= kLanes)
        return each<kRows / 2>([&](auto k) UVG_INLINED { put_two(r + 2 * k, i, v[2 * k], v[2 * k + 1]); });
#endif
    each<kRows>([&](auto k) UVG_INLINED { put(r + k, i, v[k], n); });
  }

  // Orders the stores of this thread before whatever it tells others next.
  void finish() const {
#if defined(__AVX512F__)
    if (past_) _mm_sfence();
#endif
  }

 private:
#if defined(__AVX512BF16__)
  UVG_INLINE void put_two(int64_t r, int64_t i, Vec v, Vec next) const {
    const __m512i both = narrowed(v, next);
    auto *p = reinterpret_cast<__m256i*>(row(r) + i), *q = reinterpret_cast<__m256i*>(row(r + 1) + i);
    if (past_) return _mm256_stream_si256(p, lower(both)), _mm256_stream_si256(q, upper(both));
    _mm256_storeu_si256(p, lower(both)), _mm256_storeu_si256(q, upper(both));
  }
#endif

  static bool is_past([[maybe_unused]] const void* data, [[maybe_unused]] int64_t rows,
                      [[maybe_unused]] int64_t width) {
#if defined(__AVX512F__)
    const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
    return rows * bytes >= kLarge && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 64 == 0;
#else
    return false;
#endif
  }

#if defined(__AVX512F__)
  static void stream(float* p, Vec v) { _mm512_stream_ps(p, (__m512)v); }
  template <typename Half>
  static void stream(Half* p, Vec v) {
    Half half[kLanes];
    store(half, v);
    __m256i bits;
    std::memcpy(&bits, half, sizeof bits);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
  }
#endif

  T* data_;
  int64_t width_;
  bool past_;
};

}  // namespace UVG_ISA
}  // namespace uvg
