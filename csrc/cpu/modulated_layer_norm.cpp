#include "uvg/modulated_layer_norm.h"

#include "cpu/norm_row.h"
#include "cpu/partial_sums.h"
#include "cpu/stream.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = ModulatedLayerNormParams;
enum Part { kShift, kScale, kWeight, kBias, kParts };

NormFactors factors_of(const Params& p, int64_t span) {
  const bool modulated = p.shift != nullptr && span >= 0;
  return {p.weight, p.bias, modulated ? p.shift + span * p.width : nullptr,
          modulated ? p.scale + span * p.width : nullptr};
}

template <typename T>
void forward(const Params& p) {
  const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
  const Target<T> y(p.y, p.rows, p.width);
#pragma omp parallel for num_threads(threads_for_rows(p.threads, p.rows, p.width)) schedule(static)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const NormFactors factors = factors_of(p, chunks[c].span);
    for (int64_t r = chunks[c].first; r < chunks[c].first + chunks[c].rows; ++r)
      norm_row(static_cast<const T*>(p.x) + r * p.width, p.width, p.eps, factors, p.mean + r, p.rstd + r,
               [&](int64_t i, Vec v, int64_t n) { y.put(r, i, v, n); });
    y.finish();
  }
}

template <typename T>
void backward(const Params& p) {
  const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
  PartialSums sums(chunks, kParts, p.width);
  const Target<T> dx(p.dx, p.rows, p.width);
#pragma omp parallel for num_threads(threads_for_rows(p.threads, p.rows, p.width)) schedule(static)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const NormFactors factors = factors_of(p, chunks[c].span);
    const auto start = [&](const float* parameter, Part part) {
      return parameter == nullptr ? nullptr : sums.start(c, part);
    };
    const NormSums own = {start(p.weight, kWeight), start(p.bias, kBias), start(p.shift, kShift),
                          start(p.scale, kScale)};
    for (int64_t r = chunks[c].first; r < chunks[c].first + chunks[c].rows; ++r) {
      norm_row_backward(static_cast<const T*>(p.x) + r * p.width, static_cast<const T*>(p.dy) + r * p.width, p.width,
                        p.mean[r], p.rstd[r], factors, own, [&](int64_t i, Vec v, int64_t n) { dx.put(r, i, v, n); });
    }
    dx.finish();
  }
  if (p.shift != nullptr) {
    sums.per_span(kShift, p.dshift, p.num_spans);
    sums.per_span(kScale, p.dscale, p.num_spans);
  }
  if (p.weight != nullptr) sums.total(kWeight, p.dweight);
  if (p.bias != nullptr) sums.total(kBias, p.dbias);
}

}  // namespace

void modulated_layer_norm_forward(const Params& p) {
  p.dtype == Dtype::kFloat32 ? forward<float>(p) : forward<BFloat16>(p);
}

void modulated_layer_norm_backward(const Params& p) {
  p.dtype == Dtype::kFloat32 ? backward<float>(p) : backward<BFloat16>(p);
}

}  // namespace UVG_ISA
}  // namespace uvg
