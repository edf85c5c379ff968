// Sixteen floats at once, in the instruction set that the file is compiled for (GCC and Clang vector extensions).
//
// The order of every sum is fixed by the width alone: not by alignment, neighbours or the instruction set. Functions of
// the standard library that are inline stay out: the linker would keep one instruction set's copy for all.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cpu/wide.h"

namespace uvg {
namespace UVG_ISA {

constexpr int64_t kLanes = 16;
using Vec = Several<float, kLanes>::Type;
using VecBits = Several<uint32_t, kLanes>::Type;
using VecInts = Several<int32_t, kLanes>::Type;

UVG_INLINE Vec splat(float value) { return value - Vec{}; }  // Vec{} + value: an addition, as -0 would become 0

constexpr int32_t kCounted[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// All bits of the first n lanes.
UVG_INLINE VecInts first_lanes(int64_t n) { return from_memory<VecInts>(kCounted) < static_cast<int32_t>(n); }

UVG_INLINE Vec load(const float* p) { return from_memory<Vec>(p); }

#if !defined(__AVX512F__)
// Values of bf16 as those of V, and V rounded to bf16: to nearest, ties to even.
template <typename V>
UVG_INLINE V widened(const BFloat16* p) {
  constexpr int64_t kCount = sizeof(V) / sizeof(float);
  if constexpr (kIsTwo<V>) {
    return {widened<decltype(V::low)>(p), widened<decltype(V::high)>(p + kCount / 2)};
  } else {
    const auto half = from_memory<typename Several<uint16_t, kCount>::Type>(p);
    return as<V>(convert<typename Several<uint32_t, kCount>::Type>(half) << 16);
  }
}

template <typename V>
UVG_INLINE void narrowed(V v, BFloat16* p) {
  constexpr int64_t kCount = sizeof(V) / sizeof(float);
  if constexpr (kIsTwo<V>) {
    narrowed(v.low, p), narrowed(v.high, p + kCount / 2);
  } else {
    const auto bits = as<typename Several<uint32_t, kCount>::Type>(v);
    const auto rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    to_memory(p, convert<typename Several<uint16_t, kCount>::Type>(v != v ? quiet : rounded));
  }
}

// The same of fp16. What is below its smallest normal number is left to an fp32 addition: 2^-14 taken off gives a
// subnormal one its exponent, 0.5 put on rounds to one.
template <typename V>
UVG_INLINE V widened(const Float16* p) {
  constexpr int64_t kCount = sizeof(V) / sizeof(float);
  if constexpr (kIsTwo<V>) {
    return {widened<decltype(V::low)>(p), widened<decltype(V::high)>(p + kCount / 2)};
  } else {
#if defined(__F16C__)
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    using Ints = typename Several<int32_t, kCount>::Type;
    const auto half = convert<Ints>(from_memory<typename Several<uint16_t, kCount>::Type>(p));
    const Ints number = half & 0x7FFF, wide = (number << 13) + (112 << 23);
    const Ints small = as<Ints>(as<V>(wide + (1 << 23)) - 0x1p-14f);
    const Ints large = wide + (number > 0x7BFF ? Ints{} + (112 << 23) : Ints{});
    return as<V>((number < 0x400 ? small : large) | (half & 0x8000) << 16);
#endif
  }
}

template <typename V>
UVG_INLINE void narrowed(V v, Float16* p) {
  constexpr int64_t kCount = sizeof(V) / sizeof(float);
  if constexpr (kIsTwo<V>) {
    narrowed(v.low, p), narrowed(v.high, p + kCount / 2);
  } else {
#if defined(__F16C__)
    to_memory(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    using Ints = typename Several<int32_t, kCount>::Type;
    const Ints bits = as<Ints>(v), number = bits & 0x7FFFFFFF;
    const Ints rounded = (number - (112 << 23) + 0xFFF + ((number >> 13) & 1)) >> 13;
    const Ints small = as<Ints>(as<V>(number) + 0.5f) - 0x3F000000;
    const Ints finite = number < 113 << 23 ? small : rounded;
    const Ints large = number > 0x7F800000 ? Ints{} + 0x7E00 : Ints{} + 0x7C00;
    const Ints half = (number < 143 << 23 ? finite : large) | ((bits >> 16) & 0x8000);
    to_memory(p, convert<typename Several<uint16_t, kCount>::Type>(half));
#endif
  }
}
#endif

#if defined(__AVX512F__)
// Where each 16-bit word of a result comes from: those of one vector for the upper halves, those of two in turns. One
// shuffle does what a conversion and a shift did.
constexpr uint16_t kUpper[2 * kLanes] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                         0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
constexpr uint16_t kInTurns[2 * kLanes] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

UVG_INLINE __m512i load_words(const BFloat16* p) {  // sixteen; what is above them is never looked at
  return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#endif

UVG_INLINE Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, _mm512_loadu_si512(kUpper), load_words(p));
#else
  return widened<Vec>(p);
#endif
}

// Dwords of two rows' values: the lower halves are low's.
UVG_INLINE VecBits in_pairs(const BFloat16* low, const BFloat16* high) {
#if defined(__AVX512F__)
  return (VecBits)_mm512_permutex2var_epi16(load_words(low), _mm512_loadu_si512(kInTurns), load_words(high));
#else
  return as<VecBits>(load(low)) >> 16 | as<VecBits>(load(high));
#endif
}

UVG_INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));  // as above
#else
  return widened<Vec>(p);
#endif
}

UVG_INLINE void store(float* p, Vec v) { to_memory(p, v); }

UVG_INLINE void store(BFloat16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof half);
#elif defined(__AVX512F__)
  typedef uint16_t HalfBits __attribute__((vector_size(32)));
  VecBits bits;
  std::memcpy(&bits, &v, sizeof bits);
  const VecBits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const VecBits quiet = (bits >> 16) | 0x40;
  const auto nan = as<VecBits>(v != v);
  const HalfBits half = __builtin_convertvector((nan & quiet) | (~nan & rounded), HalfBits);
  std::memcpy(p, &half, sizeof half);
#else
  narrowed(v, p);
#endif
}

#if defined(__AVX512BF16__)
// Two vectors as bf16 by one conversion, the second one in the upper half.
UVG_INLINE __m512i narrowed(Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// Unmasked, g++ 12 warns of its own header.
UVG_INLINE __m256i lower(__m512i v) { return _mm512_maskz_extracti64x4_epi64(0xFF, v, 0); }
UVG_INLINE __m256i upper(__m512i v) { return _mm512_maskz_extracti64x4_epi64(0xFF, v, 1); }
#endif

UVG_INLINE void store(Float16* p, Vec v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
#else
  narrowed(v, p);
#endif
}

// body(a value of the type): of tensors in this dtype.
template <typename Body>
UVG_INLINE void with_type(Dtype dtype, Body&& body) {
  if (dtype == Dtype::kFloat32) return body(float{});
  dtype == Dtype::kBFloat16 ? body(BFloat16{}) : body(Float16{});
}

// The same where beside fp32 it can only be Half.
template <typename Half, typename Body>
UVG_INLINE void with_float_or(Dtype dtype, Body&& body) {
  dtype == Dtype::kFloat32 ? body(float{}) : body(Half{});
}

#if defined(__AVX512F__)
inline __mmask16 first_bits(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Vec load_part(const float* p, int64_t n, Vec fill) {
  return (Vec)_mm512_mask_loadu_ps((__m512)fill, first_bits(n), p);
}

inline Vec load_part(const BFloat16* p, int64_t n, Vec fill) {
  const __m512i bits = _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_maskz_loadu_epi16(first_bits(n), p));
  return (Vec)_mm512_mask_slli_epi32((__m512i)fill, first_bits(n), bits, 16);
}

inline Vec load_part(const Float16* p, int64_t n, Vec fill) {
  return (Vec)_mm512_mask_cvtph_ps((__m512)fill, first_bits(n), _mm256_maskz_loadu_epi16(first_bits(n), p));
}

inline void store_part(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_bits(n), (__m512)v); }

template <typename T>
inline void store_part(T* p, Vec v, int64_t n) {  // of 16 bits
  __m256i half;
  store(reinterpret_cast<T*>(&half), v);
  _mm256_mask_storeu_epi16(p, first_bits(n), half);
}
#else
template <typename T>
inline Vec load_part(const T* p, int64_t n, Vec fill) {
  T part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return select(first_lanes(n), load(part), fill);
}

template <typename T>
inline void store_part(T* p, Vec v, int64_t n) {
  T part[kLanes];
  store(part, v);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}
#endif

// The first n of sixteen; the others are `fill`.
template <typename T>
inline Vec load(const T* p, int64_t n, float fill = 0.0f) {
  return n >= kLanes ? load(p) : load_part(p, n, splat(fill));
}

template <typename T>
inline void store(T* p, Vec v, int64_t n) {
  n >= kLanes ? store(p, v) : store_part(p, v, n);
}

// Lane i meets lane i + 8, then i + 4, i + 2, i + 1.
inline float sum(Vec v) {
  typedef float Four __attribute__((vector_size(16)));
#if defined(__AVX__)
  typedef float Eight __attribute__((vector_size(32)));
#if defined(__AVX512F__)  // by memcpy, g++ 12 would keep v in memory, in the loops that sum it too
  const Eight low8 = (Eight)_mm512_maskz_extractf32x8_ps(0xFF, (__m512)v, 0);  // unmasked, g++ 12 warns of its header
  const Eight eight = low8 + (Eight)_mm512_maskz_extractf32x8_ps(0xFF, (__m512)v, 1);
#else
  const Eight eight = v.low + v.high;
#endif
  Four low4, high4;
  std::memcpy(&low4, &eight, sizeof low4);
  std::memcpy(&high4, reinterpret_cast<const char*>(&eight) + sizeof low4, sizeof high4);
  const Four four = low4 + high4;
#else
  const auto eight = v.low + v.high;
  const Four four = eight.low + eight.high;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The largest lane; NaN is passed over where it can be.
inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  const auto eight = select(v.high > v.low, v.high, v.low);
  constexpr int64_t kEight = kLanes / 2;
  float lanes[kEight];
  to_memory(lanes, eight);
  for (int64_t half = kEight / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  return lanes[0];
#endif
}

// body(first column, columns) over a row in steps of sixteen; in all but the last the compiler knows the sixteen.
template <typename Body>
inline void columns(int64_t width, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
  if (i < width) body(i, width - i);
}

// Asks for the cache line of p; beyond the end of an array it asks for nothing.
template <typename T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p);
}

inline void add_to(float* total, Vec v, int64_t n) { store(total, load(total, n) + v, n); }

}  // namespace UVG_ISA
}  // namespace uvg
