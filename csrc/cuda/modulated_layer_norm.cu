#include "uvg/modulated_layer_norm.h"

#include "cuda/norm.h"

namespace uvg::cuda {
namespace {

using Params = ModulatedLayerNormParams;

template <typename T>
struct Rows {
  template <int kVector>
  static UVG_DEVICE void load_x(float (&to)[kVector], const Params& p, int64_t offset) {
    load_vector(to, static_cast<const T*>(p.x) + offset);
  }

  template <int kVector>
  static UVG_DEVICE void load_dy(float (&to)[kVector], const Params& p, int64_t offset) {
    load_vector(to, static_cast<const T*>(p.dy) + offset);
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
  float sum = 0.0f, mean, rstd;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float x[kVector];
    kept.load(x, x_row, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += x[i];
  });
  statistics<kVector>(kept, sum, p.width, p.eps, mean, rstd);
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

template <typename T, int kVector>
void backward(const Params& p, gpu::Stream stream) {
  launch_rows(backward_kernel<T, kVector>, p.rows, 2 * sizeof(T) * static_cast<size_t>(p.width), stream, p);
  norm_parameter_sums<Rows<T>, kVector>(p, stream);
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
