#include "uvg/gated_residual.h"

#include "cpu/gate.h"
#include "cpu/partial_sums.h"
#include "cpu/stream.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = GatedResidualParams;

// A chunk's rows, or all of its values as one row where no gate tells columns apart.
struct Runs {
  int64_t end, values;
  Runs(const Params& p, const RowChunk& chunk)
      : end(chunk.first + (p.gate == nullptr ? 1 : chunk.rows)),
        values(p.gate == nullptr ? chunk.rows * p.width : p.width) {}
};

template <typename H, typename Y>
void forward(const Params& p) {
  const RowChunks chunks(p.spans, p.num_spans, 2, p.rows, rows_at_once(p));
  const Target<H> out(p.out, p.rows, p.width);
#pragma omp parallel for num_threads(threads_for_rows(p.threads, p.rows, p.width)) schedule(static)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const Gate gate(p.gate, chunks[c].span, p.width);
    const Runs runs(p, chunks[c]);
    for (int64_t r = chunks[c].first; r < runs.end; ++r) {
      const H* h = static_cast<const H*>(p.h) + r * p.width;
      const Y* y = static_cast<const Y*>(p.y) + r * p.width;
      columns(runs.values,
              [&](int64_t i, int64_t n) { out.put(r, i, load(h + i, n) + gate.at(i, n) * load(y + i, n), n); });
    }
    out.finish();
  }
}

template <typename H, typename Y>
void backward(const Params& p) {
  const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
  PartialSums sums(chunks, p.gate == nullptr ? 0 : 1, p.width, p.threads);
  const Target<Y> dy(p.dy, p.rows, p.width);
#pragma omp parallel for num_threads(threads_for_rows(p.threads, p.rows, p.width)) schedule(static)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    float* own = p.gate == nullptr ? nullptr : sums.start(c, 0);
    const Gate gate(p.gate, chunks[c].span, p.width);
    const Runs runs(p, chunks[c]);
    for (int64_t r = chunks[c].first; r < runs.end; ++r) {
      const H* dout = static_cast<const H*>(p.dout) + r * p.width;
      if (own == nullptr) {
        columns(runs.values, [&](int64_t i, int64_t n) { dy.put(r, i, gate.at(i, n) * load(dout + i, n), n); });
        continue;
      }
      const Y* y = static_cast<const Y*>(p.y) + r * p.width;
      columns(p.width, [&](int64_t i, int64_t n) {
        const Vec g = load(dout + i, n);
        dy.put(r, i, gate.at(i, n) * g, n);
        add_to(own + i, g * load(y + i, n), n);
      });
    }
    dy.finish();
  }
  if (p.gate != nullptr) sums.per_span(0, p.dgate, p.num_spans);
}

template <template <typename, typename> class Run, typename Half>
void choose(const Params& p) {
  with_float_or<Half>(
      p.dtype_h, [&](auto h) { with_float_or<Half>(p.dtype_y, [&](auto y) { Run<decltype(h), decltype(y)>{}(p); }); });
}

// bf16 and fp16 do not meet in a call.
template <template <typename, typename> class Run>
void choose(const Params& p) {
  const bool fp16 = p.dtype_h == Dtype::kFloat16 || p.dtype_y == Dtype::kFloat16;
  fp16 ? choose<Run, Float16>(p) : choose<Run, BFloat16>(p);
}

template <typename H, typename Y>
struct Forward {
  void operator()(const Params& p) const { forward<H, Y>(p); }
};

template <typename H, typename Y>
struct Backward {
  void operator()(const Params& p) const { backward<H, Y>(p); }
};

}  // namespace

void gated_residual_forward(const Params& p) { choose<Forward>(p); }

void gated_residual_backward(const Params& p) { choose<Backward>(p); }

}  // namespace UVG_ISA
}  // namespace uvg
