#include "uvg/qk_norm_rope.h"

#include "cpu/partial_sums.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = QkNormRopeParams;
enum Kind { kVideo = 0, kText = 1, kNone = 2 };

// Angles of one row: cos and sin per pair of a head.
class Rope {
 public:
  explicit Rope(const Params& p) : p_(p), pairs_(p.width / p.heads / 2), cos_(pairs_ + kLanes), sin_(pairs_ + kLanes) {}

  // The row at `offset` inside span `span` (-1: not rotated).
  void seek(int64_t span, int64_t offset) {
    kind_ = kNone;
    if (span < 0) return;
    const int32_t* s = p_.spans + span * 6;
    kind_ = s[2] == kVideo ? kVideo : kText;
    if (kind_ == kText) return gather(0, pairs_, offset);
    const int64_t height = s[4], width = s[5], side = p_.width / p_.heads / 6;
    gather(0, pairs_ - 2 * side, offset / (height * width));
    gather(pairs_ - 2 * side, pairs_ - side, offset / width % height);
    gather(pairs_ - side, pairs_, offset % width);
  }

  // y = R x for every head; `turn` is -1 for the transpose. In place.
  void apply(float* row, float turn) const {
    if (kind_ == kNone) return;
    for (int64_t h = 0; h < p_.heads; ++h) {
      float* x = row + h * 2 * pairs_;
      const int64_t step = kind_ == kVideo ? 2 : 1, other = kind_ == kVideo ? 1 : pairs_;
      rotate(x, step, other, turn);
    }
  }

 private:
  void gather(int64_t first, int64_t last, int64_t position) {
    const float* row = p_.table + (kind_ * p_.positions + position) * pairs_ * 2;
    for (int64_t j = first; j < last; ++j) {
      cos_.data()[j] = row[2 * j];
      sin_.data()[j] = row[2 * j + 1];
    }
  }

  void rotate(float* x, int64_t step, int64_t other, float turn) const {
    const float *c = cos_.data(), *s = sin_.data();
    if (step == 2) {  // two loops: with constant strides the compiler makes shuffles of them
      for (int64_t j = 0; j < pairs_; ++j) {
        const float a = x[2 * j], b = x[2 * j + 1], t = turn * s[j];
        x[2 * j] = a * c[j] - b * t;
        x[2 * j + 1] = a * t + b * c[j];
      }
    } else {
      for (int64_t j = 0; j < pairs_; ++j) {
        const float a = x[j], b = x[j + other], t = turn * s[j];
        x[j] = a * c[j] - b * t;
        x[j + other] = a * t + b * c[j];
      }
    }
  }

  const Params& p_;
  int64_t pairs_;
  Floats cos_, sin_;
  int kind_ = kNone;
};

template <typename T>
void forward_row(const Params& p, int which, int64_t r, const Rope& rope, float* row) {
  const T* x = static_cast<const T*>(p.x[which]) + r * p.width;
  T* y = static_cast<T*>(p.y[which]) + r * p.width;
  Vec squares{};
  columns(p.width, [&](int64_t i, int64_t n) {
    const Vec v = load(x + i, n);
    squares += v * v;
  });
  const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(p.width) + p.eps);
  columns(p.width,
          [&](int64_t i, int64_t n) { store(row + i, load(x + i, n) * rstd * load(p.weight[which] + i, n), n); });
  rope.apply(row, 1.0f);
  columns(p.width, [&](int64_t i, int64_t n) { store(y + i, load(row + i, n), n); });
  p.rstd[which][r] = rstd;
}

template <typename T>
void backward_row(const Params& p, int which, int64_t r, const Rope& rope, float* row, float* dweight) {
  const T* x = static_cast<const T*>(p.x[which]) + r * p.width;
  const T* dy = static_cast<const T*>(p.dy[which]) + r * p.width;
  T* dx = static_cast<T*>(p.dx[which]) + r * p.width;
  const float rstd = p.rstd[which][r];
  columns(p.width, [&](int64_t i, int64_t n) { store(row + i, load(dy + i, n), n); });
  rope.apply(row, -1.0f);
  Vec projected{};
  columns(p.width, [&](int64_t i, int64_t n) {
    const Vec xhat = load(x + i, n) * rstd, g = load(row + i, n);
    add_to(dweight + i, g * xhat, n);
    const Vec weighted = g * load(p.weight[which] + i, n);
    projected += weighted * xhat;
    store(row + i, weighted, n);
  });
  const float mean = sum(projected) / static_cast<float>(p.width);
  columns(p.width, [&](int64_t i, int64_t n) {
    const Vec xhat = load(x + i, n) * rstd;
    store(dx + i, rstd * (load(row + i, n) - xhat * mean), n);
  });
}

template <typename T>
void forward(const Params& p) {
  check_rope_spans(p.spans, p.num_spans, p.positions);
  const RowChunks chunks(p.spans, p.num_spans, 6, p.rows);
#pragma omp parallel num_threads(p.threads)
  {
    Rope rope(p);
    const Floats row(p.width + kLanes);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks.size(); ++c) {
      for (int64_t r = 0; r < chunks[c].rows; ++r) {
        rope.seek(chunks[c].span, chunks[c].offset + r);
        for (int which = 0; which < 2; ++which) forward_row<T>(p, which, chunks[c].first + r, rope, row.data());
      }
    }
  }
}

template <typename T>
void backward(const Params& p) {
  check_rope_spans(p.spans, p.num_spans, p.positions);
  const RowChunks chunks(p.spans, p.num_spans, 6, p.rows);
  PartialSums sums(chunks, 2, p.width);
#pragma omp parallel num_threads(p.threads)
  {
    Rope rope(p);
    const Floats row(p.width + kLanes);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks.size(); ++c) {
      for (int64_t r = 0; r < chunks[c].rows; ++r) {
        rope.seek(chunks[c].span, chunks[c].offset + r);
        for (int which = 0; which < 2; ++which)
          backward_row<T>(p, which, chunks[c].first + r, rope, row.data(), sums.at(c, which));
      }
    }
  }
  for (int which = 0; which < 2; ++which) sums.total(which, p.dweight[which]);
}

}  // namespace

void qk_norm_rope_forward(const Params& p) { p.dtype == Dtype::kFloat32 ? forward<float>(p) : forward<BFloat16>(p); }

void qk_norm_rope_backward(const Params& p) { p.dtype == Dtype::kFloat32 ? backward<float>(p) : backward<BFloat16>(p); }

}  // namespace UVG_ISA
}  // namespace uvg
