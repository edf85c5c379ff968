#include "uvg/gated_residual_norm.h"

#include "cpu/gate.h"
#include "cpu/norm_row.h"
#include "cpu/partial_sums.h"
#include "cpu/per_thread.h"
#include "cpu/stream.h"

// A row of the residual stream stays in the cache from its update to its norm: memory sees it once.
namespace uvg {
namespace UVG_ISA {
namespace {

using Params = GatedResidualNormParams;
enum Part { kGate, kShift, kScale, kWeight, kBias, kParts };

NormFactors factors_of(const Params& p, int64_t span) {
  const bool modulated = p.shift != nullptr && span >= 0;
  return {p.weight, p.bias, modulated ? p.shift + span * p.width : nullptr,
          modulated ? p.scale + span * p.width : nullptr};
}

template <typename H, typename Y, typename N>
struct Forward {
  struct Row {  // a row that goes past the cache is normed from here
    H* values;
    Row(Scratch& scratch, int64_t width) : values(reinterpret_cast<H*>(scratch.words(width))) {}
  };

  void operator()(const Params& p) const {
    const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
    const Target<H> out(p.out, p.rows, p.width);
    const Target<N> normed(p.normed, p.rows, p.width);
    const int threads = threads_for_rows(p.threads, p.rows, p.width);
    Scratch scratch;
    const PerThread<Row> rows(scratch, threads, out.past() ? p.width : 0);
#pragma omp parallel num_threads(threads)
    {
      H* const kept = rows.own().values;
#pragma omp for schedule(static)
      for (int64_t c = 0; c < chunks.size(); ++c) {
        const Gate gate(p.gate, chunks[c].span, p.width);
        const NormFactors factors = factors_of(p, chunks[c].span);
        for (int64_t r = chunks[c].first; r < chunks[c].first + chunks[c].rows; ++r) {
          const H* h = static_cast<const H*>(p.h) + r * p.width;
          const Y* y = static_cast<const Y*>(p.y) + r * p.width;
          H* row = out.past() ? kept : out.row(r);
          columns(p.width, [&](int64_t i, int64_t n) {
            const Vec sum = load(h + i, n) + gate.at(i, n) * load(y + i, n);
            store(row + i, sum, n);
            if (out.past()) out.put(r, i, sum, n);
          });
          norm_row(row, p.width, p.eps, factors, p.mean + r, p.rstd + r,
                   [&](int64_t i, Vec v, int64_t n) { normed.put(r, i, v, n); });
        }
        out.finish(), normed.finish();
      }
    }
  }
};

template <typename H, typename Y, typename N>
struct Backward {
  void operator()(const Params& p) const {
    const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
    PartialSums sums(chunks, kParts, p.width);
    const Target<H> dh(p.dh, p.rows, p.width);
    const Target<Y> dy(p.dy, p.rows, p.width);
#pragma omp parallel for num_threads(threads_for_rows(p.threads, p.rows, p.width)) schedule(static)
    for (int64_t c = 0; c < chunks.size(); ++c) {
      const Gate gate(p.gate, chunks[c].span, p.width);
      const NormFactors factors = factors_of(p, chunks[c].span);
      const auto start = [&](const float* parameter, Part part) {
        return parameter == nullptr ? nullptr : sums.start(c, part);
      };
      const NormSums own = {start(p.weight, kWeight), start(p.bias, kBias), start(p.shift, kShift),
                            start(p.scale, kScale)};
      float* own_gate = start(p.gate, kGate);
      for (int64_t r = chunks[c].first; r < chunks[c].first + chunks[c].rows; ++r) {
        const int64_t at = r * p.width;
        const H *out = static_cast<const H*>(p.out) + at, *dout = static_cast<const H*>(p.dout) + at;
        const Y* y = static_cast<const Y*>(p.y) + at;
        norm_row_backward(out, static_cast<const N*>(p.dnormed) + at, p.width, p.mean[r], p.rstd[r], factors, own,
                          [&](int64_t i, Vec dx, int64_t n) {
                            const Vec g = load(dout + i, n) + dx;
                            dh.put(r, i, g, n);
                            dy.put(r, i, gate.at(i, n) * g, n);
                            if (own_gate != nullptr) add_to(own_gate + i, g * load(y + i, n), n);
                          });
      }
      dh.finish(), dy.finish();
    }
    if (p.gate != nullptr) sums.per_span(kGate, p.dgate, p.num_spans);
    if (p.shift != nullptr) {
      sums.per_span(kShift, p.dshift, p.num_spans);
      sums.per_span(kScale, p.dscale, p.num_spans);
    }
    if (p.weight != nullptr) sums.total(kWeight, p.dweight);
    if (p.bias != nullptr) sums.total(kBias, p.dbias);
  }
};

template <template <typename, typename, typename> class Run, typename H, typename Y>
void choose(const Params& p) {
  p.dtype_normed == Dtype::kFloat32 ? Run<H, Y, float>{}(p) : Run<H, Y, BFloat16>{}(p);
}

template <template <typename, typename, typename> class Run>
void choose(const Params& p) {
  const bool h32 = p.dtype_h == Dtype::kFloat32, y32 = p.dtype_y == Dtype::kFloat32;
  if (h32) {
    y32 ? choose<Run, float, float>(p) : choose<Run, float, BFloat16>(p);
  } else {
    y32 ? choose<Run, BFloat16, float>(p) : choose<Run, BFloat16, BFloat16>(p);
  }
}

}  // namespace

void gated_residual_norm_forward(const Params& p) { choose<Forward>(p); }

void gated_residual_norm_backward(const Params& p) { choose<Backward>(p); }

}  // namespace UVG_ISA
}  // namespace uvg
