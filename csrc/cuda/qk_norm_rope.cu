#include "uvg/qk_norm_rope.h"

#include "cuda/column_sums.h"

namespace uvg::cuda {
namespace {

using Params = QkNormRopeParams;
enum Kind { kVideo = 0, kText = 1, kNone = 2 };

// Where a row stands: its kind, and its position on each of three axes. No array: an index into it would need memory.
struct Rope {
  int kind = kNone;
  int64_t frame = 0, y = 0, x = 0;

  UVG_DEVICE Rope(const Params& p, int64_t span, int64_t row) {
    if (span < 0) return;
    const int32_t* s = p.spans + span * 6;
    const int64_t offset = row - gpu::load_global(s);
    kind = gpu::load_global(s + 2);
    if (kind == kText) {
      frame = offset;
      return;
    }
    const int64_t height = gpu::load_global(s + 4), width = gpu::load_global(s + 5);
    frame = offset / (height * width), y = offset / width % height, x = offset % width;
  }

  // (cos, sin) of a pair of a head.
  UVG_DEVICE gpu::Pack<float, 2> angle(const Params& p, int64_t pair) const {
    const int64_t pairs = p.width / p.heads / 2, side = pairs / 3;
    const int64_t position = kind == kText || pair < pairs - 2 * side ? frame : pair < pairs - side ? y : x;
    const float* at = p.table + ((kind * p.positions + position) * pairs + pair) * 2;
    return gpu::load_global(reinterpret_cast<const gpu::Pack<float, 2>*>(at));
  }

  // to = R x at the columns from `column` on, R^T x with turn = -1. fetch(values, column) gives x. Of a pair the first
  // has -sin, the second +sin; neighbours are pairs in video, halves of a head in text.
  template <int kVector, typename Fetch>
  UVG_DEVICE void rotate(float (&to)[kVector], const Params& p, int64_t column, float turn, Fetch fetch) const {
    fetch(to, column);
    if (kind == kNone) return;
    const int64_t head = p.width / p.heads, half = head / 2, place = column % head;
    float other[kVector];
    if (kind == kText || kVector == 1) {
      const bool first = kind == kText ? place < half : place % 2 == 0;
      fetch(other, column + (kind == kText ? half : 1) * (first ? 1 : -1));
    }
    float self[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) self[i] = to[i];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool first = kind == kText ? place < half : (place + i) % 2 == 0;
      const auto a = angle(p, kind == kText ? (place + i) % half : (place + i) / 2);
      const float partner = kind == kText || kVector == 1 ? other[i] : self[i ^ 1];
      to[i] = self[i] * a.at[0] + (first ? -turn : turn) * a.at[1] * partner;
    }
  }
};

template <typename T, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp, 2) forward_kernel(Params p) {
  const int64_t row = row_of_warp();
  const int which = static_cast<int>(gpu::block_y());
  if (row >= p.rows) return;
  const Rope rope(p, span_of_row(p.spans, p.num_spans, 6, row), row);
  const auto kept = kept_row<T, kVector>(p.width);
  const T* x_row = static_cast<const T*>(p.x[which]) + row * p.width;
  T* y = static_cast<T*>(p.y[which]) + row * p.width;
  const float* weight = p.weight[which];
  float squares = 0.0f;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float x[kVector];
    kept.load(x, x_row, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += x[i] * x[i];
  });
  const float rstd = gpu::reciprocal_sqrt(gpu::warp_sum(squares) / static_cast<float>(p.width) + p.eps);
  gpu::warp_barrier();  // a text row reads what other lanes keep
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float out[kVector];
    rope.rotate(out, p, c, 1.0f, [&](float (&x)[kVector], int64_t column) {
      float w[kVector];
      kept.again(x, column);
      load_vector(w, weight + column);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] *= rstd * w[i];
    });
    store_vector(y + c, out);
  });
  if (gpu::lane() == 0) gpu::store_global(p.rstd[which] + row, rstd);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp, 2) backward_kernel(Params p) {
  const int64_t row = row_of_warp();
  const int which = static_cast<int>(gpu::block_y());
  if (row >= p.rows) return;
  const Rope rope(p, span_of_row(p.spans, p.num_spans, 6, row), row);
  const auto kept_x = kept_row<T, kVector>(p.width, 0, 2), kept_dy = kept_row<T, kVector>(p.width, 1, 2);
  const T* x_row = static_cast<const T*>(p.x[which]) + row * p.width;
  const T* dy_row = static_cast<const T*>(p.dy[which]) + row * p.width;
  T* dx = static_cast<T*>(p.dx[which]) + row * p.width;
  const float rstd = gpu::load_global(p.rstd[which] + row);
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float unused[kVector];
    kept_x.load(unused, x_row, c);
    kept_dy.load(unused, dy_row, c);
  });
  gpu::warp_barrier();
  // g = gradient of xhat, and xhat, at some columns.
  const auto gradient = [&](float (&g)[kVector], float (&xhat)[kVector], int64_t c) {
    float w[kVector];
    rope.rotate(g, p, c, -1.0f, [&](float (&dy)[kVector], int64_t column) { kept_dy.again(dy, column); });
    kept_x.again(xhat, c);
    load_vector(w, p.weight[which] + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) g[i] *= w[i], xhat[i] *= rstd;
  };
  float projected = 0.0f;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float g[kVector], xhat[kVector];
    gradient(g, xhat, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) projected += g[i] * xhat[i];
  });
  const float mean = gpu::warp_sum(projected) / static_cast<float>(p.width);
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float g[kVector], xhat[kVector];
    gradient(g, xhat, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) g[i] = rstd * (g[i] - xhat[i] * mean);
    store_vector(dx + c, g);
  });
}

// dweight sums R^T dy * xhat over all rows.
template <typename T, int kVector>
struct WeightTerms {
  static constexpr int kParts = 1;
  Params p;
  int which;

  UVG_DEVICE void add(float (&sums)[kParts][kVector], int64_t, int64_t row, int64_t column) const {
    const Rope rope(p, span_of_row_alone(p.spans, p.num_spans, 6, row), row);
    const T* dy_row = static_cast<const T*>(p.dy[which]) + row * p.width;
    const float rstd = gpu::load_global(p.rstd[which] + row);
    float g[kVector], x[kVector];
    rope.rotate(g, p, column, -1.0f, [&](float (&dy)[kVector], int64_t c) { load_vector(dy, dy_row + c); });
    load_vector(x, static_cast<const T*>(p.x[which]) + row * p.width + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[0][i] += g[i] * (x[i] * rstd);
  }
};

template <typename T, int kVector>
void run(const Params& p, bool is_backward, gpu::Stream stream) {
  const size_t row_bytes = sizeof(T) * static_cast<size_t>(p.width);
  const int count = p.weight[1] == nullptr ? 1 : 2;
  if (!is_backward) return launch_rows(forward_kernel<T, kVector>, p.rows, row_bytes, stream, p, count);
  launch_rows(backward_kernel<T, kVector>, p.rows, 2 * row_bytes, stream, p, count);
  for (int which = 0; which < count; ++which) {
    column_sums<kVector>(WeightTerms<T, kVector>{p, which}, SpanTable{nullptr, 1, 6, p.rows}, p.width, p.partial,
                         Totals<1>{{p.dweight[which]}}, stream);
  }
}

void choose(const Params& p, bool is_backward, gpu::Stream stream) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kVector = 16 / sizeof(T);
    // Where rows are rotated, a chunk lies in one half of one head.
    bool whole = (p.spans == nullptr ? p.width : p.width / p.heads / 2) % kVector == 0;
    for (int i = 0; i < 2; ++i) whole &= aligned({p.x[i], p.weight[i], p.y[i], p.dy[i], p.dx[i]});
    whole ? run<T, kVector>(p, is_backward, stream) : run<T, 1>(p, is_backward, stream);
  });
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeParams& p, gpu::Stream stream) { choose(p, false, stream); }

void qk_norm_rope_backward(const QkNormRopeParams& p, gpu::Stream stream) { choose(p, true, stream); }

}  // namespace uvg::cuda
