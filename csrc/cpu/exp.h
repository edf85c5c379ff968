// exp and exp2 of sixteen floats.
#pragma once

#include "cpu/vec.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace uvg {
namespace UVG_ISA {

constexpr float kLog2E = 1.44269504f;

// Within 2 ulps where the result is a normal number. Arguments are held to -87..most; with 89, the result is infinite
// from 88.38 on. Cody and Waite's reduction to |r| <= ln 2 / 2, then a polynomial of degree 6 (coefficients of S.
// Moshier's Cephes expf).
inline Vec exp(Vec x, float most = 88.0f) {
  x = at_most(most, at_least(-87.0f, x));
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec whole = multiply_add(x, splat(kLog2E), magic), n = whole - magic;
  const Vec r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
  Vec p = splat(1.9875691500e-4f);
  p = multiply_add(p, r, splat(1.3981999507e-3f));
  p = multiply_add(p, r, splat(8.3334519073e-3f));
  p = multiply_add(p, r, splat(4.1665795894e-2f));
  p = multiply_add(p, r, splat(1.6666665459e-1f));
  p = multiply_add(p, r, splat(5.0000001201e-1f));
  p = multiply_add(p, r * r, r) + 1.0f;
#if defined(__AVX512F__)
  const VecInts power = convert<VecInts>(n) + 127;
  return p * as<Vec>(power << 23);
#else
  constexpr uint32_t kOne = 127u << 23;
  return p * as<Vec>((as<VecBits>(whole) << 23) + kOne);  // the integer lies in its lowest bits
#endif
}

#if !defined(__AVX512F__)
// 2^x, within 1.3 ulps (0.96 with FMA); x is held to -126..127. Minimax polynomial of degree 6 on [-1/2, 1/2] (2e-9).
UVG_INLINE Vec exp2(Vec x) {
  x = at_least(-126.0f, at_most(127.0f, x));
  const Vec whole = x + 12582912.0f, f = x - (whole - 12582912.0f);
  Vec p = splat(1.5353362062e-4f);
  p = multiply_add(p, f, splat(1.3398874557e-3f));
  p = multiply_add(p, f, splat(9.6184373582e-3f));
  p = multiply_add(p, f, splat(5.5503324708e-2f));
  p = multiply_add(p, f, splat(2.4022647914e-1f));
  p = multiply_add(p, f, splat(6.9314720286e-1f));
  p = multiply_add(p, f, splat(1.0f));
  constexpr uint32_t kOne = 127u << 23;
  return p * as<Vec>((as<VecBits>(whole) << 23) + kOne);  // the integer lies in its lowest bits
}
#else
// 2^x, relative error 7.5e-8; 0 at -inf; NaN stays. Minimax polynomial of degree 5 on [0, 1) (Remez).
inline Vec exp2(Vec x) {
  const auto f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 of infinities
  Vec p = splat(1.8775767000e-3f);
  p = p * f + 8.9893400236e-3f;
  p = p * f + 5.5826318116e-2f;
  p = p * f + 2.4015361702e-1f;
  p = p * f + 6.9315307320e-1f;
  p = p * f + 9.9999992506e-1f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);  // which takes the floor of x
}
#endif

}  // namespace UVG_ISA
}  // namespace uvg
