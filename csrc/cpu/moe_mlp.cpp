#include "uvg/moe_mlp.h"

#include "cpu/exp.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = MoeMlpParams;

constexpr int64_t kChunk = 8192;            // values that one thread does alone
constexpr float kSlope = 1.5957691216f;     // 2 sqrt(2 / pi)
constexpr float kCubic = 0.0713548162726f;  // kSlope * 0.044715

// GELU in its tanh form is x * s(u) with the logistic s and u = kSlope x + kCubic x^3.
struct Gelu {
  Vec share, slope;  // s(u); derivative of gelu

  explicit Gelu(Vec x) {
    const Vec square = x * x;
    const Vec u = x * (kSlope + kCubic * square);
    const Vec decay = exp(-u);
    share = 1.0f / (1.0f + decay);
    // 1 - s = decay * s keeps its digits where s is near 1
    slope = share + x * (kSlope + 3.0f * kCubic * square) * (share * share * decay);
  }
};

// body(first, count) over all values, in runs of up to sixteen.
template <typename Body>
void each(const Params& p, Body&& body) {
  const int64_t chunks = (p.size + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = c * kChunk, rest = p.size - first;
    columns(rest < kChunk ? rest : kChunk, [&](int64_t i, int64_t n) { body(first + i, n); });
  }
}

template <typename T>
void forward(const Params& p) {
  each(p, [&](int64_t i, int64_t n) {
    const Vec x = load(static_cast<const T*>(p.pre) + i, n);
    store(static_cast<T*>(p.hidden) + i, x * Gelu(x).share, n);
  });
}

template <typename T>
void backward(const Params& p) {
  each(p, [&](int64_t i, int64_t n) {
    const Vec x = load(static_cast<const T*>(p.pre) + i, n);
    const Vec dhidden = load(static_cast<const T*>(p.dhidden) + i, n);
    const Gelu gelu(x);
    store(static_cast<T*>(p.hidden) + i, x * gelu.share, n);
    store(static_cast<T*>(p.dpre) + i, dhidden * gelu.slope, n);
  });
}

}  // namespace

void moe_mlp_activate(const Params& p) { p.dtype == Dtype::kFloat32 ? forward<float>(p) : forward<BFloat16>(p); }

void moe_mlp_activate_backward(const Params& p) {
  p.dtype == Dtype::kFloat32 ? backward<float>(p) : backward<BFloat16>(p);
}

}  // namespace UVG_ISA
}  // namespace uvg
