#include "uvg/linear.h"

#include "cpu/gemm.h"

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
  pack_weight<F>(static_cast<const typename F::Value*>(p.weight), p.width, p.depth, p.pack_into, p.threads);
}

}  // namespace

void linear_words(const Params& p) {
  *p.words = p.dtype == Dtype::kFloat32 ? weight_words<Singles<float>>(p.width, p.depth)
                                        : weight_words<Halves>(p.width, p.depth);
}

void linear_pack(const Params& p) { p.dtype == Dtype::kFloat32 ? pack<Singles<float>>(p) : pack<Halves>(p); }

void linear_forward(const Params& p) { p.dtype == Dtype::kFloat32 ? forward<Singles<float>>(p) : forward<Halves>(p); }

}  // namespace UVG_ISA
}  // namespace uvg
