#include "uvg/modulated_layer_norm.h"

#include "cpu/partial_sums.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = ModulatedLayerNormParams;
enum Part { kShift, kScale, kWeight, kBias, kParts };

// The affine parts of one row; what is not there is one or zero.
struct Row {
  const float *weight, *bias, *shift, *scale;

  Row(const Params& p, int64_t span) : weight(p.weight), bias(p.bias), shift(nullptr), scale(nullptr) {
    if (p.shift != nullptr && span >= 0) {
      shift = p.shift + span * p.width;
      scale = p.scale + span * p.width;
    }
  }

  Vec affine(Vec xhat, int64_t i, int64_t n) const {
    if (weight != nullptr) xhat *= load(weight + i, n);
    if (bias != nullptr) xhat += load(bias + i, n);
    return xhat;
  }

  Vec modulate(Vec v, int64_t i, int64_t n) const {
    return scale == nullptr ? v : v * (1.0f + load(scale + i, n)) + load(shift + i, n);
  }

  // Gradient of the affine form from that of the result.
  Vec through_scale(Vec dy, int64_t i, int64_t n) const {
    return scale == nullptr ? dy : dy * (1.0f + load(scale + i, n));
  }

  Vec through_weight(Vec dy, int64_t i, int64_t n) const { return weight == nullptr ? dy : dy * load(weight + i, n); }
};

template <typename T>
void forward_row(const Params& p, int64_t r, const Row& row) {
  const T* x = static_cast<const T*>(p.x) + r * p.width;
  T* y = static_cast<T*>(p.y) + r * p.width;
  const auto width = static_cast<float>(p.width);
  Vec total{};
  columns(p.width, [&](int64_t i, int64_t n) { total += load(x + i, n); });
  const float mean = sum(total) / width;
  Vec squares{};
  columns(p.width, [&](int64_t i, int64_t n) {
    const Vec d = load(x + i, n, mean) - mean;
    squares += d * d;
  });
  const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / width + p.eps);
  columns(p.width, [&](int64_t i, int64_t n) {
    store(y + i, row.modulate(row.affine((load(x + i, n) - mean) * rstd, i, n), i, n), n);
  });
  p.mean[r] = mean;
  p.rstd[r] = rstd;
}

template <typename T>
void backward_row(const Params& p, int64_t r, const Row& row, float* const* sums) {
  const T* x = static_cast<const T*>(p.x) + r * p.width;
  const T* dy = static_cast<const T*>(p.dy) + r * p.width;
  T* dx = static_cast<T*>(p.dx) + r * p.width;
  const float mean = p.mean[r], rstd = p.rstd[r];
  Vec plain{}, projected{};
  columns(p.width, [&](int64_t i, int64_t n) {
    const Vec xhat = (load(x + i, n) - mean) * rstd;
    Vec g = load(dy + i, n);  // zero beyond the row, and so is all that it is multiplied with
    if (row.scale != nullptr) {
      add_to(sums[kShift] + i, g, n);
      add_to(sums[kScale] + i, g * row.affine(xhat, i, n), n);
    }
    g = row.through_scale(g, i, n);
    if (row.bias != nullptr) add_to(sums[kBias] + i, g, n);
    if (row.weight != nullptr) add_to(sums[kWeight] + i, g * xhat, n);
    g = row.through_weight(g, i, n);
    plain += g;
    projected += g * xhat;
  });
  const auto width = static_cast<float>(p.width);
  const float mean_g = sum(plain) / width, mean_gx = sum(projected) / width;
  columns(p.width, [&](int64_t i, int64_t n) {
    const Vec xhat = (load(x + i, n) - mean) * rstd;
    const Vec g = row.through_weight(row.through_scale(load(dy + i, n), i, n), i, n);
    store(dx + i, rstd * (g - mean_g - xhat * mean_gx), n);
  });
}

template <typename T>
void forward(const Params& p) {
  const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const Row row(p, chunks[c].span);
    for (int64_t r = 0; r < chunks[c].rows; ++r) forward_row<T>(p, chunks[c].first + r, row);
  }
}

template <typename T>
void backward(const Params& p) {
  const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
  PartialSums sums(chunks, kParts, p.width);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const Row row(p, chunks[c].span);
    float* const own[kParts] = {sums.at(c, kShift), sums.at(c, kScale), sums.at(c, kWeight), sums.at(c, kBias)};
    for (int64_t r = 0; r < chunks[c].rows; ++r) backward_row<T>(p, chunks[c].first + r, row, own);
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
