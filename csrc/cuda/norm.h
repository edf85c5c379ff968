// What the ops with a modulated LayerNorm share: the affine parts of a row, and sums over rows for their gradients.
//
// Params has shift, scale, spans, num_spans, weight, bias, rows, width, mean and rstd. Rows tells where x and dy lie:
// load_x and load_dy of (float (&to)[kVector], const Params& p, int64_t offset).
#pragma once

#include "cuda/column_sums.h"

namespace uvg::cuda {

template <int kVector>
UVG_DEVICE void fill(float (&to)[kVector], float value) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = value;
}

// The affine parts of one row at some columns; what is not there is one or zero.
template <int kVector>
struct Affine {
  float weight[kVector], bias[kVector], scale[kVector], shift[kVector];  // scale has its 1 in it

  template <typename Params>
  UVG_DEVICE Affine(const Params& p, int64_t span, int64_t column) {
    p.weight != nullptr ? load_vector(weight, p.weight + column) : fill(weight, 1.0f);
    p.bias != nullptr ? load_vector(bias, p.bias + column) : fill(bias, 0.0f);
    if (span < 0) {
      fill(scale, 1.0f);
      fill(shift, 0.0f);
      return;
    }
    load_vector(scale, p.scale + span * p.width + column);
    load_vector(shift, p.shift + span * p.width + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) scale[i] += 1.0f;
  }
};

// Mean and 1 / deviation of the row that `kept` holds, whose sum over this lane's columns is `sum`.
template <int kVector, typename Kept>
UVG_DEVICE void statistics(const Kept& kept, float sum, int64_t width, float eps, float& mean, float& rstd) {
  mean = gpu::warp_sum(sum) / static_cast<float>(width);
  float squares = 0.0f;
  lane_columns<kVector>(width, [&](int64_t c) {
    float x[kVector];
    kept.again(x, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += (x[i] - mean) * (x[i] - mean);
  });
  rstd = gpu::reciprocal_sqrt(gpu::warp_sum(squares) / static_cast<float>(width) + eps);
}

// Per span: dshift sums dy, dscale sums dy * (xhat * weight + bias).
template <typename Params, typename Rows, int kVector>
struct ModulationTerms {
  static constexpr int kParts = 2;
  Params p;

  UVG_DEVICE void add(float (&sums)[kParts][kVector], int64_t, int64_t row, int64_t column) const {
    float x[kVector], dy[kVector];
    Rows::load_x(x, p, row * p.width + column);
    Rows::load_dy(dy, p, row * p.width + column);
    const float mean = gpu::load_global(p.mean + row), rstd = gpu::load_global(p.rstd + row);
    const Affine<kVector> a(p, -1, column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sums[0][i] += dy[i];
      sums[1][i] += dy[i] * ((x[i] - mean) * rstd * a.weight[i] + a.bias[i]);
    }
  }
};

// Over all rows: dbias sums dy * (1 + scale), dweight that times xhat.
template <typename Params, typename Rows, int kVector>
struct AffineTerms {
  static constexpr int kParts = 2;
  Params p;

  UVG_DEVICE void add(float (&sums)[kParts][kVector], int64_t, int64_t row, int64_t column) const {
    float x[kVector], dy[kVector], scale[kVector];
    Rows::load_x(x, p, row * p.width + column);
    Rows::load_dy(dy, p, row * p.width + column);
    const float mean = gpu::load_global(p.mean + row), rstd = gpu::load_global(p.rstd + row);
    const int64_t span = p.scale == nullptr ? -1 : span_of_row_alone(p.spans, p.num_spans, 2, row);
    span < 0 ? fill(scale, 0.0f) : load_vector(scale, p.scale + span * p.width + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float g = dy[i] * (1.0f + scale[i]);
      sums[0][i] += g;
      sums[1][i] += g * ((x[i] - mean) * rstd);
    }
  }
};

// The gradients of shift, scale, weight and bias that are asked for.
template <typename Rows, int kVector, typename Params>
void norm_parameter_sums(const Params& p, gpu::Stream stream) {
  if (p.dscale != nullptr) {
    column_sums<kVector>(ModulationTerms<Params, Rows, kVector>{p}, SpanTable{p.spans, p.num_spans, 2, p.rows}, p.width,
                         p.partial, Totals<2>{{p.dshift, p.dscale}}, stream);
  }
  if (p.dweight == nullptr && p.dbias == nullptr) return;
  column_sums<kVector>(AffineTerms<Params, Rows, kVector>{p}, SpanTable{nullptr, 1, 2, p.rows}, p.width, p.partial,
                       Totals<2>{{p.dbias, p.dweight}}, stream);
}

}  // namespace uvg::cuda
