// exp and exp2 of sixteen floats.
#pragma once

#include "cpu/vec.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace uvg {
namespace UVG_ISA {

constexpr float kLog2E = 1.44269504f;

// Within 2 ulps where the result is a normal number. Arguments are held to -87..88. Cody and Waite's reduction to
// |r| <= ln 2 / 2, then a polynomial of degree 6 (coefficients of S. Moshier's Cephes expf).
inline Vec exp(Vec x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * kLog2E + magic) - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecInts power = __builtin_convertvector(n, VecInts) + 127;
  return p * reinterpret_cast<Vec>(power << 23);
}

// 2^f for |f| <= 1/2, relative error 7.5e-8: minimax polynomial of degree 5 (Remez).
inline Vec exp2_fraction(Vec f) {
  Vec p = splat(1.3276471993e-3f);
  p = p * f + 9.6755413345e-3f;
  p = p * f + 5.5507132735e-2f;
  p = p * f + 2.4022119724e-1f;
  p = p * f + 6.9314696706e-1f;
  return p * f + 1.0000000717f;
}

// 2^x; below 2^-126 what is left of it or 0; 0 at -inf; NaN stays.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const auto f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 of infinities
  return (Vec)_mm512_scalef_ps((__m512)exp2_fraction(f), (__m512)(x - f));
#else
  const Vec held = x > splat(128.0f) ? splat(128.0f) : (x < splat(-126.0f) ? splat(-126.0f) : x);
  const Vec n = (held + 12582912.0f) - 12582912.0f;
  const VecInts power = __builtin_convertvector(n, VecInts) + 127;
  const Vec y = exp2_fraction(held - n) * reinterpret_cast<Vec>(power << 23);
  return x < splat(-126.0f) ? Vec{} : y;
#endif
}

}  // namespace UVG_ISA
}  // namespace uvg
