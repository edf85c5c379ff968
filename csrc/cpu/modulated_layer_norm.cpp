#include "uvg/modulated_layer_norm.h"

#include "cpu/norm_row.h"
#include "cpu/partial_sums.h"
#include "cpu/stream.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = ModulatedLayerNormParams;

template <int64_t kRows, typename T>
UVG_NOINLINE void forward_rows(const Params& p, int64_t r, const NormFactors& factors, const Target<T> y) {
  const int64_t width = p.width;
  const T* x = static_cast<const T*>(p.x) + r * width;
  norm_rows<kRows>(
      x, width, p.eps, factors, p.mean + r, p.rstd + r,
      [&](int64_t i, int64_t n, Vec(&values)[kRows])
          UVG_INLINED { each<kRows>([&](auto k) UVG_INLINED { values[k] = load(x + k * width + i, n); }); },
      [&](int64_t i, int64_t n, const Vec(&values)[kRows]) UVG_INLINED {
        ask_ahead<kRows>(x, width, i);
        y.put_rows(r, i, values, n);
      });
}

template <typename T>
void forward(const Params& p) {
  const RowChunks chunks(p.spans, p.num_spans, 2, p.rows, rows_at_once(p));
  const Target<T> y(p.y, p.rows, p.width);
#pragma omp parallel for num_threads(threads_for_rows(p.threads, p.rows, p.width)) schedule(static)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const NormFactors factors = NormFactors::of(p, chunks[c].span);
    by_groups(chunks[c], [&](int64_t r, auto rows) { forward_rows<rows.value, T>(p, r, factors, y); });
    y.finish();
  }
}

template <int64_t kRows, typename T>
UVG_NOINLINE void backward_rows(const Params& p, int64_t r, const NormFactors& factors, float* plain, float* projected,
                                const Target<T> dx) {
  const int64_t width = p.width;
  const T *x = static_cast<const T*>(p.x) + r * width, *dy = static_cast<const T*>(p.dy) + r * width;
  norm_rows_backward<kRows>(x, dy, width, p.mean + r, p.rstd + r, factors, plain, projected,
                            [&](int64_t i, int64_t n, const Vec(&values)[kRows]) UVG_INLINED {
                              ask_ahead<kRows>(x, width, i), ask_ahead<kRows>(dy, width, i);
                              dx.put_rows(r, i, values, n);
                            });
}

template <typename T>
void backward(const Params& p) {
  const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
  PartialSums sums(chunks, kNormParts, p.width, p.threads);
  const Target<T> dx(p.dx, p.rows, p.width);
#pragma omp parallel for num_threads(threads_for_rows(p.threads, p.rows, p.width)) schedule(static)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const NormFactors factors = NormFactors::of(p, chunks[c].span);
    float *plain = sums.start(c, kPlain), *projected = sums.start(c, kProjected);
    by_groups(chunks[c],
              [&](int64_t r, auto rows) { backward_rows<rows.value, T>(p, r, factors, plain, projected, dx); });
    dx.finish();
  }
  finish_norm(p, chunks, sums);
}

}  // namespace

void modulated_layer_norm_forward(const Params& p) {
  with_type(p.dtype, [&](auto type) { forward<decltype(type)>(p); });
}

void modulated_layer_norm_backward(const Params& p) {
  with_type(p.dtype, [&](auto type) { backward<decltype(type)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
