// GELU in its tanh form, and its derivative, of sixteen floats.
#pragma once

#include "cpu/exp.h"

namespace uvg {
namespace UVG_ISA {

constexpr float kGeluSlope = 1.5957691216f;     // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0.0713548162726f;  // kGeluSlope * 0.044715
constexpr float kGeluFar = 1e4f;                // from there on the derivative is 1 or 0, and x^3 still a number

// x * s(u) with the logistic s and u = kGeluSlope x + kGeluCubic x^3.
inline Vec gelu(Vec x) {
  const Vec u = x * (kGeluSlope + kGeluCubic * x * x);
#if defined(__AVX512F__)
  return x / (1.0f + exp2(u * -kLog2E));
#else
  return x / (1.0f + exp(-u, 89.0f));  // far below 0, by infinity
#endif
}

struct GeluAndSlope {
  Vec value, slope;  // gelu(x), its derivative

  explicit GeluAndSlope(Vec x) {
    Vec near = select(x > splat(kGeluFar), splat(kGeluFar), x);
    near = select(near < splat(-kGeluFar), splat(-kGeluFar), near);
    const Vec square = near * near;
    const Vec u = near * (kGeluSlope + kGeluCubic * square);
    const Vec decay = exp(-u);
    const Vec share = 1.0f / (1.0f + decay);
    value = x * share;
    // 1 - s = decay * s keeps its digits where s is near 1
    slope = share + near * (kGeluSlope + 3.0f * kGeluCubic * square) * (share * share * decay);
  }
};

}  // namespace UVG_ISA
}  // namespace uvg
