#include "uvg/moe_mlp.h"

#include "cpu/gemm.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = MoeMlpParams;

template <typename F>
void forward(const Params& p) {
  using T = typename F::Value;
  const auto* x = static_cast<const T*>(p.x);
  const auto *b1 = static_cast<const T*>(p.b1), *b2 = static_cast<const T*>(p.b2);
  auto *room = static_cast<T*>(p.room), *y = static_cast<T*>(p.y), *pre = static_cast<T*>(p.pre);
  for (int64_t e = 0; e < p.experts; ++e) {
    const uint32_t* w1 = p.w1 + e * weight_words<F>(p.hidden, p.width);
    const uint32_t* w2 = p.w2 + e * weight_words<F>(p.width, p.hidden);
    for (int64_t r = p.offsets[e]; r < p.offsets[e + 1]; r += p.room_rows) {
      const int64_t left = p.offsets[e + 1] - r, rows = left < p.room_rows ? left : p.room_rows;
      gemm<F>({x + r * p.x_row, w1, b1 + e * p.hidden, rows, p.width, p.hidden, p.x_row, p.hidden, true, room,
               pre == nullptr ? nullptr : pre + r * p.hidden},
              p.threads);
      gemm<F>({room, w2, b2 + e * p.width, rows, p.hidden, p.width, p.hidden, p.width, false, y + r * p.width, nullptr},
              p.threads);
    }
  }
}

}  // namespace

void moe_mlp_forward(const Params& p) {
  with_format(p.dtype, [&](auto format) { forward<decltype(format)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
