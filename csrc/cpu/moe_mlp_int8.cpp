#include "uvg/moe_mlp_int8.h"

#include "cpu/gemm_int8.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = MoeMlpInt8Params;

template <typename T>
void forward(const Params& p) {
  using F = Bytes<T>;
  const auto* x = static_cast<const T*>(p.x);
  const auto *b1 = static_cast<const T*>(p.b1), *b2 = static_cast<const T*>(p.b2);
  auto *room = static_cast<T*>(p.room), *y = static_cast<T*>(p.y);
  for (int64_t e = 0; e < p.experts; ++e) {
    const uint32_t* w1 = p.w1 + e * weight_words<F>(p.hidden, p.width);
    const uint32_t* w2 = p.w2 + e * weight_words<F>(p.width, p.hidden);
    for (int64_t r = p.offsets[e]; r < p.offsets[e + 1]; r += p.room_rows) {
      const int64_t left = p.offsets[e + 1] - r, rows = left < p.room_rows ? left : p.room_rows;
      gemm_int8<T>(x + r * p.x_row, p.x_row, p.bytes,
                   {nullptr, w1, b1 + e * p.hidden, rows, p.width, p.hidden, 0, p.hidden, true, room, nullptr},
                   p.threads);
      gemm_int8<T>(
          room, p.hidden, p.bytes,
          {nullptr, w2, b2 + e * p.width, rows, p.hidden, p.width, 0, p.width, false, y + r * p.width, nullptr},
          p.threads);
    }
  }
}

}  // namespace

void moe_mlp_int8_forward(const Params& p) {
  with_type(p.dtype, [&](auto type) { forward<decltype(type)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
