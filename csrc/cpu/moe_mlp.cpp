#include "uvg/moe_mlp.h"

#include "cpu/gelu.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = MoeMlpParams;

constexpr int64_t kChunk = 8192;  // values that one thread does alone

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
    store(static_cast<T*>(p.hidden) + i, gelu(x), n);
  });
}

template <typename T>
void backward(const Params& p) {
  each(p, [&](int64_t i, int64_t n) {
    const Vec x = load(static_cast<const T*>(p.pre) + i, n);
    const Vec dhidden = load(static_cast<const T*>(p.dhidden) + i, n);
    const GeluAndSlope gelu(x);
    store(static_cast<T*>(p.hidden) + i, gelu.value, n);
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
