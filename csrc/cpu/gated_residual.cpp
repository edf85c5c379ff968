#include "uvg/gated_residual.h"

#include "cpu/partial_sums.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = GatedResidualParams;

// The gate of a chunk's rows: a row no span covers has gate 0, as in the reference.
struct Gate {
  const float* values;
  float constant;

  Gate(const Params& p, int64_t span)
      : values(p.gate != nullptr && span >= 0 ? p.gate + span * p.width : nullptr),
        constant(p.gate == nullptr ? 1.0f : 0.0f) {}

  Vec at(int64_t i, int64_t n) const { return values == nullptr ? splat(constant) : load(values + i, n); }
};

template <typename H, typename Y>
void forward(const Params& p) {
  const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const Gate gate(p, chunks[c].span);
    for (int64_t r = chunks[c].first; r < chunks[c].first + chunks[c].rows; ++r) {
      const H* h = static_cast<const H*>(p.h) + r * p.width;
      const Y* y = static_cast<const Y*>(p.y) + r * p.width;
      H* out = static_cast<H*>(p.out) + r * p.width;
      columns(p.width,
              [&](int64_t i, int64_t n) { store(out + i, load(h + i, n) + gate.at(i, n) * load(y + i, n), n); });
    }
  }
}

template <typename H, typename Y>
void backward(const Params& p) {
  const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
  PartialSums sums(chunks, p.gate == nullptr ? 0 : 1, p.width);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const Gate gate(p, chunks[c].span);
    for (int64_t r = chunks[c].first; r < chunks[c].first + chunks[c].rows; ++r) {
      const H* dout = static_cast<const H*>(p.dout) + r * p.width;
      Y* dy = static_cast<Y*>(p.dy) + r * p.width;
      columns(p.width, [&](int64_t i, int64_t n) { store(dy + i, gate.at(i, n) * load(dout + i, n), n); });
      if (gate.values == nullptr) continue;
      const Y* y = static_cast<const Y*>(p.y) + r * p.width;
      columns(p.width, [&](int64_t i, int64_t n) { add_to(sums.at(c, 0) + i, load(dout + i, n) * load(y + i, n), n); });
    }
  }
  if (p.gate != nullptr) sums.per_span(0, p.dgate, p.num_spans);
}

template <template <typename, typename> class Run>
void choose(const Params& p) {
  const bool h32 = p.dtype_h == Dtype::kFloat32, y32 = p.dtype_y == Dtype::kFloat32;
  if (h32) {
    y32 ? Run<float, float>{}(p) : Run<float, BFloat16>{}(p);
  } else {
    y32 ? Run<BFloat16, float>{}(p) : Run<BFloat16, BFloat16>{}(p);
  }
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
