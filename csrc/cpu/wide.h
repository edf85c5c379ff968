// Sixteen values in as many registers as they take, where no register holds them all: halves, and halves of those.
// Of a vector larger than a register, g++ 12 keeps every value in memory, through every operation; of these it does not
// (fp32 products with AVX2: 14 times as fast).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define UVG_INLINE inline __attribute__((always_inline))
#define UVG_NOINLINE __attribute__((noinline))
#define UVG_INLINED __attribute__((always_inline))  // of a lambda: arrays of vectors that it sees stay in registers

namespace uvg {
namespace UVG_ISA {

// Two of what holds values of type T, a vector or two again. Operators work value by value, as a vector's do.
template <typename Half, typename T>
struct Two {
  Half low, high;

  T operator[](int64_t i) const {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(this) + i * static_cast<int64_t>(sizeof value), sizeof value);
    return value;
  }

  template <typename Halves>
  static UVG_INLINE Two<Halves, int32_t> both(Halves low, Halves high) {
    return {low, high};
  }

#define UVG_EACH_HALF(op)                                                                                         \
  friend UVG_INLINE Two operator op(Two a, Two b) { return {a.low op b.low, a.high op b.high}; }                  \
  friend UVG_INLINE Two operator op(Two a, T b) { return {a.low op b, a.high op b}; }                             \
  friend UVG_INLINE Two operator op(T a, Two b) { return {a op b.low, a op b.high}; }                             \
  friend UVG_INLINE Two& operator op## = (Two & a, Two b) { return a.low op## = b.low, a.high op## = b.high, a; } \
  friend UVG_INLINE Two& operator op## = (Two & a, T b) { return a.low op## = b, a.high op## = b, a; }
  UVG_EACH_HALF(+)
  UVG_EACH_HALF(-)
  UVG_EACH_HALF(*)
  UVG_EACH_HALF(/)
  UVG_EACH_HALF(&)
  UVG_EACH_HALF(|)
  UVG_EACH_HALF(^)
#undef UVG_EACH_HALF
  friend UVG_INLINE Two operator<<(Two a, int32_t by) { return {a.low << by, a.high << by}; }
  friend UVG_INLINE Two operator>>(Two a, int32_t by) { return {a.low >> by, a.high >> by}; }
  friend UVG_INLINE Two operator-(Two a) { return {-a.low, -a.high}; }
  friend UVG_INLINE Two operator~(Two a) { return {~a.low, ~a.high}; }
  // All bits where it is so.
  friend UVG_INLINE auto operator<(Two a, Two b) { return both(a.low < b.low, a.high < b.high); }
  friend UVG_INLINE auto operator<(Two a, T b) { return both(a.low < b, a.high < b); }
  friend UVG_INLINE auto operator>(Two a, Two b) { return both(a.low > b.low, a.high > b.high); }
  friend UVG_INLINE auto operator>(Two a, T b) { return both(a.low > b, a.high > b); }
  friend UVG_INLINE auto operator!=(Two a, Two b) { return both(a.low != b.low, a.high != b.high); }
  friend UVG_INLINE auto operator!=(Two a, T b) { return both(a.low != b, a.high != b); }
};

#if defined(__AVX512F__)
constexpr int64_t kRegister = 64;  // bytes
#elif defined(__AVX__)
constexpr int64_t kRegister = 32;
#else
constexpr int64_t kRegister = 16;
#endif

template <typename V>
constexpr bool kIsTwo = false;
template <typename Half, typename T>
constexpr bool kIsTwo<Two<Half, T>> = true;

// kCount values of type T: one vector where a register holds them.
template <typename T, int64_t kCount, bool kFits = kCount * int64_t{sizeof(T)} <= kRegister>
struct Several {
  typedef T Type __attribute__((vector_size(kCount * sizeof(T))));
};
template <typename T, int64_t kCount>
struct Several<T, kCount, false> {
  using Type = Two<typename Several<T, kCount / 2>::Type, T>;
};

// The bits of v as another type's.
template <typename To, typename From>
UVG_INLINE To as(From v) {
  if constexpr (kIsTwo<From>) {
    return {as<decltype(To::low)>(v.low), as<decltype(To::high)>(v.high)};
  } else {
    return reinterpret_cast<To>(v);
  }
}

// The values of v as another type's.
template <typename To, typename From>
UVG_INLINE To convert(From v) {
  if constexpr (kIsTwo<From>) {
    return {convert<decltype(To::low)>(v.low), convert<decltype(To::high)>(v.high)};
  } else {
    return __builtin_convertvector(v, To);
  }
}

// a where all bits of the mask are set, b where none is.
template <typename Mask, typename V>
UVG_INLINE V select(Mask mask, V a, V b) {
  if constexpr (kIsTwo<V>) {
    return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
  } else {
    return mask ? a : b;
  }
}

// The larger, the smaller of a number and each of v; NaN stays.
template <typename V>
UVG_INLINE V at_least(float low, V v) {
  if constexpr (kIsTwo<V>) {
    return {at_least(low, v.low), at_least(low, v.high)};
  } else {
#if defined(__AVX__) && !defined(__AVX512F__)  // g++ 12 makes two instructions of the other
    return (V)_mm256_max_ps(_mm256_set1_ps(low), (__m256)v);
#else
    return v < low ? low - V{} : v;
#endif
  }
}
template <typename V>
UVG_INLINE V at_most(float high, V v) {
  if constexpr (kIsTwo<V>) {
    return {at_most(high, v.low), at_most(high, v.high)};
  } else {
#if defined(__AVX__) && !defined(__AVX512F__)
    return (V)_mm256_min_ps(_mm256_set1_ps(high), (__m256)v);
#else
    return v > high ? high - V{} : v;
#endif
  }
}

// a * b + c, rounded once where the instruction set can. Elsewhere in the kernels a product and a sum are rounded one
// by one (CMakeLists.txt): left to itself, g++ fuses them in one branch and not in the other, and a row's bits would
// depend on the rows beside it. With AVX-512 it is left to itself.
template <typename V>
UVG_INLINE V multiply_add(V a, V b, V c) {
  if constexpr (kIsTwo<V>) {
    return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
  } else {
#if defined(__FMA__) && !defined(__AVX512F__)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
  }
}

// What lies in memory, at any address.
template <typename V>
UVG_INLINE V from_memory(const void* p) {
  if constexpr (kIsTwo<V>) {
    return {from_memory<decltype(V::low)>(p),
            from_memory<decltype(V::high)>(static_cast<const char*>(p) + sizeof(V) / 2)};
  } else {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <typename V>
UVG_INLINE void to_memory(void* p, V v) {
  if constexpr (kIsTwo<V>) {
    to_memory(p, v.low), to_memory(static_cast<char*>(p) + sizeof(V) / 2, v.high);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

}  // namespace UVG_ISA
}  // namespace uvg
