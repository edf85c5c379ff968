// Layer norm of a group of rows, forward and backward, for the kernels that hold a group in cache.
#pragma once

#include "cpu/partial_sums.h"
#include "cpu/rows.h"
#include "cpu/vec.h"

namespace uvg {
namespace UVG_ISA {

// The parts of a norm: y = (xhat * weight + bias) * (1 + scale) + shift. What is not there is null; shift and scale are
// both there or neither.
struct NormFactors {
  const float *weight, *bias, *shift, *scale;  // [width]

  template <typename Params>
  static NormFactors of(const Params& p, int64_t span) {
    const bool modulated = p.shift != nullptr && span >= 0;
    return {p.weight, p.bias, modulated ? p.shift + span * p.width : nullptr,
            modulated ? p.scale + span * p.width : nullptr};
  }

  Vec one_and_scale(int64_t i, int64_t n) const { return scale == nullptr ? splat(1.0f) : 1.0f + load(scale + i, n); }

  Vec weights(int64_t i, int64_t n) const { return weight == nullptr ? splat(1.0f) : load(weight + i, n); }

  Vec biases(int64_t i, int64_t n) const { return bias == nullptr ? Vec{} : load(bias + i, n); }

  // y = xhat * slope + offset
  Vec slope(int64_t i, int64_t n) const { return weights(i, n) * one_and_scale(i, n); }

  Vec offset(int64_t i, int64_t n) const {
    const Vec inner = biases(i, n) * one_and_scale(i, n);
    return shift == nullptr ? inner : inner + load(shift + i, n);
  }
};

// x: the first of kRows rows. first(first column, columns, Vec[kRows]) gives their values, in order and once;
// then they are read from x. put(first column, columns, Vec[kRows]) gets the results.
template <int64_t kRows, typename X, typename First, typename Put>
UVG_INLINE void norm_rows(const X* x, int64_t width, float eps, const NormFactors& factors, float* mean, float* rstd,
                          First&& first, Put&& put) {
  const auto size = static_cast<float>(width);
  float sums[kRows], middle[kRows], scale[kRows];
  sum_columns(width, sums, first);
  each<kRows>([&](auto k) UVG_INLINED { mean[k] = middle[k] = sums[k] / size; });
  sum_columns(width, sums, [&](int64_t i, int64_t n, Vec(&squares)[kRows]) UVG_INLINED {
    each<kRows>([&](auto k) UVG_INLINED {
      const Vec d = load(x + k * width + i, n, middle[k]) - middle[k];
      squares[k] = d * d;
    });
  });
  each<kRows>([&](auto k) UVG_INLINED { rstd[k] = scale[k] = 1.0f / __builtin_sqrtf(sums[k] / size + eps); });
  columns(width, [&](int64_t i, int64_t n) UVG_INLINED {
    const Vec slope = factors.slope(i, n), offset = factors.offset(i, n);
    Vec y[kRows];
    each<kRows>([&](auto k)
                    UVG_INLINED { y[k] = (load(x + k * width + i, n) - middle[k]) * scale[k] * slope + offset; });
    put(i, n, y);
  });
}

// The first n lanes of v, 0 in the others.
inline Vec only(Vec v, int64_t n) { return as<Vec>(as<VecInts>(v) & first_lanes(n)); }

// Of which a chunk's sums over its rows are: dy, and dy * xhat.
enum NormPart { kPlain, kProjected, kNormParts };

// x, dy: the first of kRows rows. plain, projected: the sums of their chunk. put(first column, columns, Vec[kRows])
// gets the gradients of x.
template <int64_t kRows, typename X, typename Y, typename Put>
UVG_INLINE void norm_rows_backward(const X* x, const Y* dy, int64_t width, const float* mean, const float* rstd,
                                   const NormFactors& factors, float* plain, float* projected, Put&& put) {
  const auto size = static_cast<float>(width);
  float middle[kRows], scale[kRows], sums[2 * kRows];
  each<kRows>([&](auto k) UVG_INLINED { middle[k] = mean[k], scale[k] = rstd[k]; });
  sum_columns(width, sums, [&](int64_t i, int64_t n, Vec(&terms)[2 * kRows]) UVG_INLINED {
    const Vec slope = factors.slope(i, n);
    Vec column = {}, column_x = {};
    each<kRows>([&](auto k) UVG_INLINED {
      const Vec xhat = (load(x + k * width + i, n) - middle[k]) * scale[k];
      const Vec g = load(dy + k * width + i, n);  // zero beyond the row, and so is all that it is multiplied with
      column += g;
      column_x += g * xhat;
      terms[k] = g * slope;
      terms[kRows + k] = terms[k] * xhat;
    });
    add_to(plain + i, column, n), add_to(projected + i, column_x, n);
  });
  each<2 * kRows>([&](auto k) UVG_INLINED { sums[k] /= size; });
  columns(width, [&](int64_t i, int64_t n) UVG_INLINED {
    const Vec slope = factors.slope(i, n);
    Vec dx[kRows];  // that of a row of one value is 0: `only` rounds the product before the mean is taken off
    each<kRows>([&](auto k) UVG_INLINED {
      const Vec xhat = (load(x + k * width + i, n) - middle[k]) * scale[k];
      const Vec g = load(dy + k * width + i, n);
      const Vec inner = n < kLanes ? only(g * slope, n) : g * slope;
      dx[k] = scale[k] * (inner - sums[k] - xhat * sums[kRows + k]);
    });
    put(i, n, dx);
  });
}

// dshift, dscale, dweight and dbias, where the parameters are given, out of the sums of the chunks.
template <typename Params>
void finish_norm(const Params& p, const RowChunks& chunks, const PartialSums& sums) {
  sums.by_columns([&](int64_t first, int64_t count) {
    const auto clear = [&](const float* parameter, float* gradient, int64_t rows) {
      if (parameter != nullptr) sums.clear(gradient, rows, first, count);
    };
    clear(p.shift, p.dshift, p.num_spans), clear(p.scale, p.dscale, p.num_spans);
    clear(p.weight, p.dweight, 1), clear(p.bias, p.dbias, 1);
    for (int64_t c = 0; c < chunks.size(); ++c) {
      const float *plain = sums.at(c, kPlain), *projected = sums.at(c, kProjected);
      const NormFactors factors = NormFactors::of(p, chunks[c].span);
      const int64_t span = chunks[c].span * p.width;
      columns(count, [&](int64_t at, int64_t n) UVG_INLINED {
        const int64_t i = first + at;
        Vec g = load(plain + i, n), g_xhat = load(projected + i, n);
        if (factors.scale != nullptr) {
          add_to(p.dshift + span + i, g, n);
          add_to(p.dscale + span + i, factors.weights(i, n) * g_xhat + factors.biases(i, n) * g, n);
        }
        const Vec one = factors.one_and_scale(i, n);
        if (p.bias != nullptr) add_to(p.dbias + i, g * one, n);
        if (p.weight != nullptr) add_to(p.dweight + i, g_xhat * one, n);
      });
    }
  });
}

}  // namespace UVG_ISA
}  // namespace uvg
