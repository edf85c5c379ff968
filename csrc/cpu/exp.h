// exp of sixteen floats: within 2 ulps of the true value where the result is a normal number, never 0, inf or NaN
// for numbers.
#pragma once

#include "cpu/vec.h"

namespace uvg {
namespace UVG_ISA {

typedef int32_t VecInts __attribute__((vector_size(64)));

// Arguments are held to -87..88. Cody and Waite's reduction to |r| <= ln 2 / 2, then a polynomial of degree 6
// (coefficients of S. Moshier's Cephes expf).
inline Vec exp(Vec x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
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

}  // namespace UVG_ISA
}  // namespace uvg
