#include "uvg/qk_norm_rope.h"

#include "cpu/partial_sums.h"
#include "cpu/per_thread.h"
#include "cpu/rope.h"
#include "cpu/rows.h"
#include "cpu/stream.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = QkNormRopeParams;

int tensors(const Params& p) { return p.weight[1] == nullptr ? 1 : 2; }

template <typename T>
UVG_NOINLINE void forward_row(const Params& p, int which, int64_t r, const Rope& rope, const Target<T> y) {
  const T* x = static_cast<const T*>(p.x[which]) + r * p.width;
  const float* weight = p.weight[which];
  const float squares = sum_row(p.width, [&](int64_t i, int64_t n) UVG_INLINED {
    const Vec v = load(x + i, n);
    return v * v;
  });
  const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(p.width) + p.eps);
  rope.apply([&](int64_t i, int64_t n) UVG_INLINED { return load(x + i, n) * rstd * load(weight + i, n); },
             [&](int64_t i, Vec v, int64_t n) UVG_INLINED {
               ask_ahead<1>(x, p.width, i);
               y.put(r, i, v, n);
             });
  p.rstd[which][r] = rstd;
}

// row: room for the gradient of the normed row.
template <typename T>
UVG_NOINLINE void backward_row(const Params& p, int which, int64_t r, const Rope& rope, float* row, float* dweight,
                               const Target<T> dx) {
  const T* x = static_cast<const T*>(p.x[which]) + r * p.width;
  const T* dy = static_cast<const T*>(p.dy[which]) + r * p.width;
  const float* weight = p.weight[which];
  const float rstd = p.rstd[which][r];
  Vec projected = {};
  rope.apply([&](int64_t i, int64_t n) UVG_INLINED { return load(dy + i, n); },
             [&](int64_t i, Vec g, int64_t n) UVG_INLINED {
               const Vec xhat = load(x + i, n) * rstd;  // zero beyond the columns
               add_to(dweight + i, g * xhat, n);
               const Vec weighted = g * load(weight + i, n);
               store(row + i, weighted, n);
               projected += weighted * xhat;
             });
  const float mean = sum(projected) / static_cast<float>(p.width);
  columns(p.width, [&](int64_t i, int64_t n) UVG_INLINED {
    ask_ahead<1>(x, p.width, i), ask_ahead<1>(dy, p.width, i);
    dx.put(r, i, rstd * (load(row + i, n) - load(x + i, n) * rstd * mean), n);
  });
}

template <typename T>
void forward(const Params& p) {
  check_rope_spans(p.spans, p.num_spans, p.positions);
  const RowChunks chunks(p.spans, p.num_spans, 6, p.rows, rows_at_once(p));
  const int threads = threads_for_rows(p.threads, p.rows, p.width);
  Scratch scratch;
  const PerThread<Rope> ropes(scratch, threads, p);
  const Target<T> y[2] = {{p.y[0], p.rows, p.width}, {p.y[1], p.rows, p.width}};
#pragma omp parallel num_threads(threads)
  {
    Rope& rope = ropes.own();
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks.size(); ++c) {
      for (int64_t r = 0; r < chunks[c].rows; ++r) {
        rope.seek(chunks[c].span, chunks[c].offset + r, false);
        for (int which = 0; which < tensors(p); ++which) forward_row(p, which, chunks[c].first + r, rope, y[which]);
      }
      for (const Target<T>& target : y) target.finish();
    }
  }
}

struct BackwardRoom {
  Rope rope;
  float* row;

  BackwardRoom(Scratch& scratch, const Params& p) : rope(scratch, p), row(scratch.floats(p.width + kLanes)) {}
};

template <typename T>
void backward(const Params& p) {
  check_rope_spans(p.spans, p.num_spans, p.positions);
  const RowChunks chunks(p.spans, p.num_spans, 6, p.rows);
  PartialSums sums(chunks, tensors(p), p.width, p.threads);
  const int threads = threads_for_rows(p.threads, p.rows, p.width);
  Scratch scratch;
  const PerThread<BackwardRoom> rooms(scratch, threads, p);
  const Target<T> dx[2] = {{p.dx[0], p.rows, p.width}, {p.dx[1], p.rows, p.width}};
#pragma omp parallel num_threads(threads)
  {
    auto& [rope, row] = rooms.own();
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks.size(); ++c) {
      float* own[2];
      for (int which = 0; which < tensors(p); ++which) own[which] = sums.start(c, which);
      for (int64_t r = 0; r < chunks[c].rows; ++r) {
        rope.seek(chunks[c].span, chunks[c].offset + r, true);
        for (int which = 0; which < tensors(p); ++which)
          backward_row(p, which, chunks[c].first + r, rope, row, own[which], dx[which]);
      }
      for (const Target<T>& target : dx) target.finish();
    }
  }
  for (int which = 0; which < tensors(p); ++which) sums.total(which, p.dweight[which]);
}

}  // namespace

void qk_norm_rope_forward(const Params& p) {
  with_type(p.dtype, [&](auto type) { forward<decltype(type)>(p); });
}

void qk_norm_rope_backward(const Params& p) {
  with_type(p.dtype, [&](auto type) { backward<decltype(type)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
