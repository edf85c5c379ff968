#include "uvg/gated_residual.h"

#include "cuda/column_sums.h"
#include "cuda/gate.h"

namespace uvg::cuda {
namespace {

using Params = GatedResidualParams;

template <typename H, typename Y, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp, 2) forward_kernel(Params p) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const int64_t span = p.gate == nullptr ? -1 : span_of_row(p.spans, p.num_spans, 2, row);
  const H* h_row = static_cast<const H*>(p.h) + row * p.width;
  const Y* y_row = static_cast<const Y*>(p.y) + row * p.width;
  H* out = static_cast<H*>(p.out) + row * p.width;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float h[kVector], y[kVector], gate[kVector];
    load_vector(h, h_row + c);
    load_vector(y, y_row + c);
    load_gate(gate, p, span, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) h[i] += gate[i] * y[i];
    store_vector(out + c, h);
  });
}

template <typename H, typename Y, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp, 2) backward_kernel(Params p) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const int64_t span = p.gate == nullptr ? -1 : span_of_row(p.spans, p.num_spans, 2, row);
  const H* dout_row = static_cast<const H*>(p.dout) + row * p.width;
  Y* dy = static_cast<Y*>(p.dy) + row * p.width;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float dout[kVector], gate[kVector];
    load_vector(dout, dout_row + c);
    load_gate(gate, p, span, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) dout[i] *= gate[i];
    store_vector(dy + c, dout);
  });
}

template <typename H, typename Y, int kVector>
struct GateTerms {
  static constexpr int kParts = 1;
  const H* dout_rows;
  const Y* y_rows;
  int64_t width;

  UVG_DEVICE void add(float (&sums)[kParts][kVector], int64_t, int64_t row, int64_t column) const {
    float dout[kVector], y[kVector];
    load_vector(dout, dout_rows + row * width + column);
    load_vector(y, y_rows + row * width + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[0][i] += dout[i] * y[i];
  }
};

template <typename H, typename Y, int kVector>
void forward(const Params& p, gpu::Stream stream) {
  launch_rows(forward_kernel<H, Y, kVector>, p.rows, 0, stream, p);
}

template <typename H, typename Y, int kVector>
void backward(const Params& p, gpu::Stream stream) {
  launch_rows(backward_kernel<H, Y, kVector>, p.rows, 0, stream, p);
  if (p.gate == nullptr) return;
  const SpanTable table{p.spans, p.num_spans, 2, p.rows};
  const GateTerms<H, Y, kVector> terms{static_cast<const H*>(p.dout), static_cast<const Y*>(p.y), p.width};
  column_sums<kVector>(terms, table, p.width, p.partial, Totals<1>{{p.dgate}}, stream);
}

template <typename H, typename Y>
void run(const Params& p, bool is_backward, gpu::Stream stream) {
  constexpr int kVector = 16 / sizeof(Y);
  if (p.width % kVector == 0 && aligned({p.h, p.y, p.gate, p.out, p.dout, p.dy})) {
    is_backward ? backward<H, Y, kVector>(p, stream) : forward<H, Y, kVector>(p, stream);
  } else {
    is_backward ? backward<H, Y, 1>(p, stream) : forward<H, Y, 1>(p, stream);
  }
}

// The stream has y's dtype, or fp32.
void choose(const Params& p, bool is_backward, gpu::Stream stream) {
  with_dtype(p.dtype_y, [&](auto y) {
    using Y = typename decltype(y)::Type;
    p.dtype_h == p.dtype_y ? run<Y, Y>(p, is_backward, stream) : run<float, Y>(p, is_backward, stream);
  });
}

}  // namespace

void gated_residual_forward(const GatedResidualParams& p, gpu::Stream stream) { choose(p, false, stream); }

void gated_residual_backward(const GatedResidualParams& p, gpu::Stream stream) { choose(p, true, stream); }

}  // namespace uvg::cuda
