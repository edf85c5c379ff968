#include "uvg/gated_residual_norm.h"

#include "cuda/gate.h"
#include "cuda/norm.h"

namespace uvg::cuda {
namespace {

using Params = GatedResidualNormParams;

// normed and dnormed may have any dtype beside those of h and y: the kernels ask when they run.
template <int kVector>
UVG_DEVICE void load_normed(float (&to)[kVector], const void* from, Dtype dtype, int64_t offset) {
  if (dtype == Dtype::kFloat32) return load_vector(to, static_cast<const float*>(from) + offset);
  if (dtype == Dtype::kBFloat16) return load_vector(to, static_cast<const BFloat16*>(from) + offset);
  load_vector(to, static_cast<const Float16*>(from) + offset);
}

template <int kVector>
UVG_DEVICE void store_normed(void* to, Dtype dtype, int64_t offset, const float (&from)[kVector]) {
  if (dtype == Dtype::kFloat32) return store_vector(static_cast<float*>(to) + offset, from);
  if (dtype == Dtype::kBFloat16) return store_vector(static_cast<BFloat16*>(to) + offset, from);
  store_vector(static_cast<Float16*>(to) + offset, from);
}

template <typename H>
struct Rows {
  template <int kVector>
  static UVG_DEVICE void load_x(float (&to)[kVector], const Params& p, int64_t offset) {
    load_vector(to, static_cast<const H*>(p.out) + offset);
  }

  template <int kVector>
  static UVG_DEVICE void load_dy(float (&to)[kVector], const Params& p, int64_t offset) {
    load_normed(to, p.dnormed, p.dtype_normed, offset);
  }
};

UVG_DEVICE int64_t span_of(const Params& p, int64_t row) {
  return p.spans == nullptr ? -1 : span_of_row(p.spans, p.num_spans, 2, row);
}

UVG_DEVICE int64_t norm_span(const Params& p, int64_t span) { return p.scale == nullptr ? -1 : span; }

template <typename H, typename Y, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp, 2) forward_kernel(Params p) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const int64_t span = span_of(p, row), first = row * p.width;
  const auto kept = kept_row<H, kVector>(p.width);
  float sum = 0.0f, mean, rstd;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float h[kVector], y[kVector], gate[kVector];
    load_vector(h, static_cast<const H*>(p.h) + first + c);
    load_vector(y, static_cast<const Y*>(p.y) + first + c);
    load_gate(gate, p, span, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) h[i] += gate[i] * y[i];
    kept.keep(h, c);  // the norm reads the stream as it is stored
    store_vector(static_cast<H*>(p.out) + first + c, h);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += h[i];
  });
  statistics<kVector>(kept, sum, p.width, p.eps, mean, rstd);
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float x[kVector];
    kept.again(x, c);
    const Affine<kVector> a(p, norm_span(p, span), c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      x[i] = ((x[i] - mean) * rstd * a.weight[i] + a.bias[i]) * a.scale[i] + a.shift[i];
    }
    store_normed(p.normed, p.dtype_normed, first + c, x);
  });
  if (gpu::lane() != 0) return;
  gpu::store_global(p.mean + row, mean);
  gpu::store_global(p.rstd + row, rstd);
}

// A row's way back through the norm: dh = dout + rstd * (g - mean of g - xhat * mean of g xhat), g = dnormed * (1 +
// scale) * weight, in fp32.
template <typename H>
struct Back {
  int64_t row, span;
  float mean, rstd, mean_g, mean_gx;

  template <int kVector>
  UVG_DEVICE void gradient(float (&g)[kVector], float (&xhat)[kVector], const Params& p, int64_t column) const {
    Rows<H>::load_x(xhat, p, row * p.width + column);
    Rows<H>::load_dy(g, p, row * p.width + column);
    const Affine<kVector> a(p, span, column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) g[i] *= a.scale[i] * a.weight[i], xhat[i] = (xhat[i] - mean) * rstd;
  }

  template <int kVector>
  UVG_DEVICE void stream(float (&dh)[kVector], const Params& p, int64_t column) const {
    float g[kVector], xhat[kVector];
    gradient(g, xhat, p, column);
    load_vector(dh, static_cast<const H*>(p.dout) + row * p.width + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) dh[i] += rstd * (g[i] - mean_g - xhat[i] * mean_gx);
  }
};

// The rows of out and dnormed are read twice: the second time from the cache, into which this warp has just read them.
template <typename H, typename Y, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp, 2) backward_kernel(Params p) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const int64_t span = span_of(p, row), first = row * p.width;
  Back<H> back{row, norm_span(p, span), gpu::load_global(p.mean + row), gpu::load_global(p.rstd + row), 0.0f, 0.0f};
  float plain = 0.0f, projected = 0.0f;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float g[kVector], xhat[kVector];
    back.gradient(g, xhat, p, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) plain += g[i], projected += g[i] * xhat[i];
  });
  back.mean_g = gpu::warp_sum(plain) / static_cast<float>(p.width);
  back.mean_gx = gpu::warp_sum(projected) / static_cast<float>(p.width);
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float dh[kVector], gate[kVector];
    back.stream(dh, p, c);
    store_vector(static_cast<H*>(p.dh) + first + c, dh);
    load_gate(gate, p, span, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) dh[i] *= gate[i];
    store_vector(static_cast<Y*>(p.dy) + first + c, dh);
  });
  if (gpu::lane() == 0) {
    gpu::store_global(reinterpret_cast<gpu::Pack<float, 2>*>(p.row_means) + row, {{back.mean_g, back.mean_gx}});
  }
}

// dgate sums dh * y, of dh as it was before it was rounded.
template <typename H, typename Y, int kVector>
struct GateTerms {
  static constexpr int kParts = 1;
  Params p;

  UVG_DEVICE void add(float (&sums)[kParts][kVector], int64_t span, int64_t row, int64_t column) const {
    const auto means = gpu::load_global(reinterpret_cast<const gpu::Pack<float, 2>*>(p.row_means) + row);
    const float mean = gpu::load_global(p.mean + row), rstd = gpu::load_global(p.rstd + row);
    const Back<H> back{row, norm_span(p, span), mean, rstd, means.at[0], means.at[1]};
    float dh[kVector], y[kVector];
    back.stream(dh, p, column);
    load_vector(y, static_cast<const Y*>(p.y) + row * p.width + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[0][i] += dh[i] * y[i];
  }
};

template <typename H, typename Y, int kVector>
void run(const Params& p, bool is_backward, gpu::Stream stream) {
  if (!is_backward) {
    return launch_rows(forward_kernel<H, Y, kVector>, p.rows, sizeof(H) * static_cast<size_t>(p.width), stream, p);
  }
  launch_rows(backward_kernel<H, Y, kVector>, p.rows, 0, stream, p);
  if (p.gate != nullptr) {
    column_sums<kVector>(GateTerms<H, Y, kVector>{p}, SpanTable{p.spans, p.num_spans, 2, p.rows}, p.width, p.partial,
                         Totals<1>{{p.dgate}}, stream);
  }
  norm_parameter_sums<Rows<H>, kVector>(p, stream);
}

// The stream has y's dtype, or fp32.
void choose(const Params& p, bool is_backward, gpu::Stream stream) {
  const bool whole =
      aligned({p.h, p.y, p.gate, p.shift, p.scale, p.weight, p.bias, p.out, p.normed, p.dout, p.dnormed, p.dh, p.dy});
  const auto with = [&](auto h, auto y) {
    using H = typename decltype(h)::Type;
    using Y = typename decltype(y)::Type;
    constexpr int kVector = 16 / sizeof(Y);
    whole&& p.width % kVector == 0 ? run<H, Y, kVector>(p, is_backward, stream) : run<H, Y, 1>(p, is_backward, stream);
  };
  with_dtype(p.dtype_y, [&](auto y) { p.dtype_h == p.dtype_y ? with(y, y) : with(Tag<float>{}, y); });
}

}  // namespace

void gated_residual_norm_forward(const Params& p, gpu::Stream stream) { choose(p, false, stream); }

void gated_residual_norm_backward(const Params& p, gpu::Stream stream) { choose(p, true, stream); }

}  // namespace uvg::cuda
