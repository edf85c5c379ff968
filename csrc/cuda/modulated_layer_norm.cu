#include "uvg/modulated_layer_norm.h"

#include "cuda/column_sums.h"

namespace uvg::cuda {
namespace {

using Params = ModulatedLayerNormParams;

template <int kVector>
UVG_DEVICE void fill(float (&to)[kVector], float value) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = value;
}

// The affine parts of one row at some columns; what is not there is one or zero.
template <int kVector>
struct Affine {
  float weight[kVector], bias[kVector], scale[kVector], shift[kVector];  // scale has its 1 in it

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

UVG_DEVICE int64_t span_of(const Params& p, int64_t row) {
  return p.scale == nullptr ? -1 : span_of_row(p.spans, p.num_spans, 2, row);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp, 2) forward_kernel(Params p) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const int64_t span = span_of(p, row);
  const auto kept = kept_row<T, kVector>(p.width);
  const T* x_row = static_cast<const T*>(p.x) + row * p.width;
  T* y = static_cast<T*>(p.y) + row * p.width;
  float sum = 0.0f, squares = 0.0f;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float x[kVector];
    kept.load(x, x_row, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += x[i];
  });
  const float mean = gpu::warp_sum(sum) / static_cast<float>(p.width);
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float x[kVector];
    kept.again(x, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += (x[i] - mean) * (x[i] - mean);
  });
  const float rstd = gpu::reciprocal_sqrt(gpu::warp_sum(squares) / static_cast<float>(p.width) + p.eps);
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float x[kVector];
    kept.again(x, c);
    const Affine<kVector> a(p, span, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      x[i] = ((x[i] - mean) * rstd * a.weight[i] + a.bias[i]) * a.scale[i] + a.shift[i];
    }
    store_vector(y + c, x);
  });
  if (gpu::lane() != 0) return;
  gpu::store_global(p.mean + row, mean);
  gpu::store_global(p.rstd + row, rstd);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp, 2) backward_kernel(Params p) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const int64_t span = span_of(p, row);
  const auto kept_x = kept_row<T, kVector>(p.width, 0, 2), kept_dy = kept_row<T, kVector>(p.width, 1, 2);
  const T* x_row = static_cast<const T*>(p.x) + row * p.width;
  const T* dy_row = static_cast<const T*>(p.dy) + row * p.width;
  T* dx = static_cast<T*>(p.dx) + row * p.width;
  const float mean = gpu::load_global(p.mean + row), rstd = gpu::load_global(p.rstd + row);
  float plain = 0.0f, projected = 0.0f;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float x[kVector], g[kVector];
    kept_x.load(x, x_row, c);
    kept_dy.load(g, dy_row, c);
    const Affine<kVector> a(p, span, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      g[i] *= a.scale[i] * a.weight[i];
      plain += g[i];
      projected += g[i] * ((x[i] - mean) * rstd);
    }
  });
  const float mean_g = gpu::warp_sum(plain) / static_cast<float>(p.width);
  const float mean_gx = gpu::warp_sum(projected) / static_cast<float>(p.width);
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float x[kVector], g[kVector];
    kept_x.again(x, c);
    kept_dy.again(g, c);
    const Affine<kVector> a(p, span, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      g[i] = rstd * (g[i] * (a.scale[i] * a.weight[i]) - mean_g - (x[i] - mean) * rstd * mean_gx);
    }
    store_vector(dx + c, g);
  });
}

// Per span: dshift sums dy, dscale sums dy * (xhat * weight + bias).
template <typename T, int kVector>
struct ModulationTerms {
  static constexpr int kParts = 2;
  Params p;

  UVG_DEVICE void add(float (&sums)[kParts][kVector], int64_t, int64_t row, int64_t column) const {
    float x[kVector], dy[kVector];
    load_vector(x, static_cast<const T*>(p.x) + row * p.width + column);
    load_vector(dy, static_cast<const T*>(p.dy) + row * p.width + column);
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
template <typename T, int kVector>
struct AffineTerms {
  static constexpr int kParts = 2;
  Params p;

  UVG_DEVICE void add(float (&sums)[kParts][kVector], int64_t, int64_t row, int64_t column) const {
    float x[kVector], dy[kVector], scale[kVector];
    load_vector(x, static_cast<const T*>(p.x) + row * p.width + column);
    load_vector(dy, static_cast<const T*>(p.dy) + row * p.width + column);
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

template <typename T, int kVector>
void backward(const Params& p, gpu::Stream stream) {
  launch_rows(backward_kernel<T, kVector>, p.rows, 2 * sizeof(T) * static_cast<size_t>(p.width), stream, p);
  if (p.dscale != nullptr) {
    const SpanTable table{p.spans, p.num_spans, 2, p.rows};
    column_sums<kVector>(ModulationTerms<T, kVector>{p}, table, p.width, p.partial, Totals<2>{{p.dshift, p.dscale}},
                         stream);
  }
  if (p.dweight == nullptr && p.dbias == nullptr) return;
  column_sums<kVector>(AffineTerms<T, kVector>{p}, SpanTable{nullptr, 1, 2, p.rows}, p.width, p.partial,
                       Totals<2>{{p.dbias, p.dweight}}, stream);
}

template <typename T, int kVector>
void run(const Params& p, bool is_backward, gpu::Stream stream) {
  if (is_backward) return backward<T, kVector>(p, stream);
  launch_rows(forward_kernel<T, kVector>, p.rows, sizeof(T) * static_cast<size_t>(p.width), stream, p);
}

void choose(const Params& p, bool is_backward, gpu::Stream stream) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kVector = 16 / sizeof(T);
    const bool whole = p.width % kVector == 0 && aligned({p.x, p.shift, p.scale, p.weight, p.bias, p.y, p.dy, p.dx});
    whole ? run<T, kVector>(p, is_backward, stream) : run<T, 1>(p, is_backward, stream);
  });
}

}  // namespace

void modulated_layer_norm_forward(const ModulatedLayerNormParams& p, gpu::Stream stream) { choose(p, false, stream); }

void modulated_layer_norm_backward(const ModulatedLayerNormParams& p, gpu::Stream stream) { choose(p, true, stream); }

}  // namespace uvg::cuda
