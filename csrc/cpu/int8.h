// Rows of floats as bytes, and the format of their products: whole numbers, summed exactly.
//
// The reference rounds in the same steps, so that the bytes are the same everywhere. A row that holds a NaN or an
// infinity has NaN as its scale.
#pragma once

#include "cpu/tile.h"

namespace uvg {
namespace UVG_ISA {

constexpr float kLeastRange = 1e-30f;  // of the values of a row: with less its scale would have no inverse

#if defined(__AVX512F__)
// To even where two are as near. Masks that keep all: without one, g++ 12 warns of its own header.
UVG_INLINE VecInts nearest(Vec x) { return (VecInts)_mm512_maskz_cvtps_epi32(0xFFFF, (__m512)x); }

UVG_INLINE void store_bytes(uint8_t* p, VecInts v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)v));
}

inline float smallest(Vec v) { return _mm512_reduce_min_ps((__m512)v); }
#else
UVG_INLINE VecInts nearest(Vec x) {  // not by adding 1.5 * 2^23, which a compiler fuses with what made x
  float lanes[kLanes];
  store(lanes, x);
  for (float& lane : lanes) lane = __builtin_rintf(lane);
  return convert<VecInts>(load(lanes));
}

UVG_INLINE void store_bytes(uint8_t* p, VecInts v) {
  int32_t lanes[kLanes];
  to_memory(lanes, v);
  for (int64_t i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(lanes[i]);
}

inline float smallest(Vec v) { return -largest(-v); }
#endif

// The least and the greatest of a row's values and 0, and 0 or what is no number.
struct Range {
  float low, high, poison;

  template <typename T>
  Range(const T* row, int64_t width) {
    Vec least{}, most{}, odd{};
    columns(width, [&](int64_t i, int64_t n) {
      const Vec x = load(row + i, n);
      least = select(x < least, x, least), most = select(x > most, x, most), odd += x * 0.0f;
    });
    low = smallest(least), high = largest(most), poison = sum(odd);
  }
};

// row * by + offset to whole numbers of at most `most`, stored as bytes; up to fifteen bytes past the row are `offset`.
// Returns the sum of the numbers without their offset.
template <typename T>
UVG_INLINE int32_t to_bytes(const T* row, int64_t width, float by, int32_t offset, int32_t most, uint8_t* out) {
  VecInts total{};
  columns(width, [&](int64_t i, int64_t n) {
    VecInts x = nearest(load(row + i, n) * by);
    total += x;
    x += offset;
    store_bytes(out + i, select(x > most, VecInts{} + most, x));
  });
  int32_t all = 0;
  for (int64_t i = 0; i < kLanes; ++i) all += total[i];
  return all;
}

// What a row of whole numbers carries behind it. value = (byte - offset) * scale; number: the offset of a row of
// unsigned bytes, the sum of one of signed ones.
struct Tail {
  float scale;
  int32_t number;
};

// Bytes 0 to 255 over all that lies between the least and the greatest value.
template <typename T>
Tail to_unsigned(const T* row, int64_t width, uint8_t* out) {
  const Range range(row, width);
  const float whole = range.high - range.low, most = whole > kLeastRange ? whole : kLeastRange, by = 255.0f / most;
  const int32_t offset = nearest(splat(-range.low * by))[0];
  to_bytes(row, width, by, offset, 255, out);
  return {most / 255.0f + range.poison, offset};
}

// Bytes -127 to 127, each `offset` higher.
template <typename T>
Tail to_signed(const T* row, int64_t width, int32_t offset, uint8_t* out) {
  const Range range(row, width);
  const float far = range.high > -range.low ? range.high : -range.low, most = far > kLeastRange ? far : kLeastRange;
  const int32_t total = to_bytes(row, width, 127.0f / most, offset, 255, out);
  return {most / 127.0f + range.poison, total};
}

// A row of unsigned bytes of values of type T, with its tail, times a panel of signed bytes with theirs.
template <typename T>
struct Bytes {
  using Value = T;
  using Left = uint8_t;
  using Sum = VecInts;
  static constexpr int64_t kPer = 4, kTail = 2;
  static constexpr bool kRaw = true;

  static UVG_INLINE VecInts mac(VecInts sum, uint32_t left, VecBits right) {
#if defined(__AVX512VNNI__)
    return (VecInts)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(static_cast<int>(left)), (__m512i)right);
#else
    const auto bytes = as<VecInts>(right);
    for (int at = 0; at < 32; at += 8) sum += ((bytes << (24 - at)) >> 24) * static_cast<int32_t>(left >> at & 0xFF);
    return sum;
#endif
  }
};

}  // namespace UVG_ISA
}  // namespace uvg
