// Layer norm of one row, forward and backward, for the kernels that hold a row in cache.
#pragma once

#include "cpu/vec.h"

namespace uvg {
namespace UVG_ISA {

// The parts of a norm: y = (xhat * weight + bias) * (1 + scale) + shift. What is not there is null; shift and scale are
// both there or neither.
struct NormFactors {
  const float *weight, *bias, *shift, *scale;  // [width]

  Vec affine(Vec xhat, int64_t i, int64_t n) const {
    if (weight != nullptr) xhat *= load(weight + i, n);
    if (bias != nullptr) xhat += load(bias + i, n);
    return xhat;
  }

  Vec modulate(Vec v, int64_t i, int64_t n) const {
    return scale == nullptr ? v : v * (1.0f + load(scale + i, n)) + load(shift + i, n);
  }

  // Gradient of xhat from that of the result.
  Vec through(Vec dy, int64_t i, int64_t n) const {
    if (scale != nullptr) dy *= 1.0f + load(scale + i, n);
    return weight == nullptr ? dy : dy * load(weight + i, n);
  }
};

// Where the gradients of a norm's parts add up, [width] each; those of absent parts are not touched.
struct NormSums {
  float *weight, *bias, *shift, *scale;
};

// Sum of term(first column, columns) over a row: four sums side by side, which hide the latency of an addition.
template <typename Term>
inline float sum_columns(int64_t width, Term&& term) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
    for (int64_t j = 0; j < 4; ++j) sums[j] += term(i + j * kLanes, kLanes);
  for (; i < width; i += kLanes) sums[0] += term(i, width - i < kLanes ? width - i : kLanes);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// put(first column, y, columns) gets the result.
template <typename X, typename Put>
inline void norm_row(const X* x, int64_t width, float eps, const NormFactors& factors, float* mean, float* rstd,
                     Put&& put) {
  const auto size = static_cast<float>(width);
  const float middle = sum_columns(width, [&](int64_t i, int64_t n) { return load(x + i, n); }) / size;
  const float squares = sum_columns(width, [&](int64_t i, int64_t n) {
    const Vec d = load(x + i, n, middle) - middle;
    return d * d;
  });
  const float scale = 1.0f / __builtin_sqrtf(squares / size + eps);
  columns(width, [&](int64_t i, int64_t n) {
    put(i, factors.modulate(factors.affine((load(x + i, n) - middle) * scale, i, n), i, n), n);
  });
  *mean = middle;
  *rstd = scale;
}

// put(first column, dx, columns) gets the gradient of x.
template <typename X, typename Y, typename Put>
inline void norm_row_backward(const X* x, const Y* dy, int64_t width, float mean, float rstd,
                              const NormFactors& factors, const NormSums& sums, Put&& put) {
  Vec plain[2] = {}, projected[2] = {};
  const auto step = [&](int64_t i, int64_t n, int64_t k) {
    const Vec xhat = (load(x + i, n) - mean) * rstd;
    Vec g = load(dy + i, n);  // zero beyond the row, and so is all that it is multiplied with
    if (factors.scale != nullptr) {
      add_to(sums.shift + i, g, n);
      add_to(sums.scale + i, g * factors.affine(xhat, i, n), n);
      g *= 1.0f + load(factors.scale + i, n);
    }
    if (factors.bias != nullptr) add_to(sums.bias + i, g, n);
    if (factors.weight != nullptr) {
      add_to(sums.weight + i, g * xhat, n);
      g *= load(factors.weight + i, n);
    }
    plain[k] += g;
    projected[k] += g * xhat;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) step(i, kLanes, 0), step(i + kLanes, kLanes, 1);
  for (; i < width; i += kLanes) step(i, width - i < kLanes ? width - i : kLanes, 0);
  const auto size = static_cast<float>(width);
  const float mean_g = sum(plain[0] + plain[1]) / size, mean_gx = sum(projected[0] + projected[1]) / size;
  columns(width, [&](int64_t c, int64_t n) {
    const Vec xhat = (load(x + c, n) - mean) * rstd, g = factors.through(load(dy + c, n), c, n);
    put(c, rstd * (g - mean_g - xhat * mean_gx), n);
  });
}

}  // namespace UVG_ISA
}  // namespace uvg
