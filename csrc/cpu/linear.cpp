#include "uvg/linear.h"

#include "cpu/gemm.h"
#include "cpu/partial_sums.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = LinearParams;

template <typename F>
void forward(const Params& p) {
  using T = typename F::Value;
  gemm<F>({static_cast<const T*>(p.x), p.packed, static_cast<const T*>(p.bias), p.rows, p.depth, p.width, p.x_row,
           p.out_row, p.gelu, static_cast<T*>(p.out), static_cast<T*>(p.pre)},
          p.threads);
}

template <typename F>
void pack(const Params& p) {
  pack_weight<F>(static_cast<const typename F::Value*>(p.weight), p.width, p.depth, p.pack_into,
                 threads_for_rows(p.threads, p.width, p.depth));
}

constexpr int64_t kAtOnce = 4096;  // values; untuned

template <typename T>
void slopes(const GeluBackwardParams& p) {
  const T *dy = static_cast<const T*>(p.dy), *pre = static_cast<const T*>(p.pre);
  const int64_t parts = (p.size + kAtOnce - 1) / kAtOnce;
#pragma omp parallel for num_threads(threads_for_rows(p.threads, parts, kAtOnce)) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * kAtOnce, left = p.size - first;
    columns(left < kAtOnce ? left : kAtOnce, [&](int64_t i, int64_t n) {
      const Vec slope = GeluAndSlope(load(pre + first + i, n)).slope;
      store(static_cast<T*>(p.dz) + first + i, load(dy + first + i, n) * slope, n);
    });
  }
}

}  // namespace

void linear_words(const Params& p) {
  *p.words = p.dtype == Dtype::kFloat32 ? weight_words<Singles<float>>(p.width, p.depth)
                                        : weight_words<Halves>(p.width, p.depth);
}

void linear_pack(const Params& p) { p.dtype == Dtype::kFloat32 ? pack<Singles<float>>(p) : pack<Halves>(p); }

void linear_forward(const Params& p) { p.dtype == Dtype::kFloat32 ? forward<Singles<float>>(p) : forward<Halves>(p); }

void gelu_backward(const GeluBackwardParams& p) { p.dtype == Dtype::kFloat32 ? slopes<float>(p) : slopes<BFloat16>(p); }

}  // namespace UVG_ISA
}  // namespace uvg
