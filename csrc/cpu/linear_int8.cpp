#include "uvg/linear_int8.h"

#include "cpu/gemm_int8.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = LinearInt8Params;

template <typename T>
void forward(const Params& p) {
  const auto *x = static_cast<const T*>(p.x), *bias = static_cast<const T*>(p.bias);
  gemm_int8<T>(x, p.x_row, p.room,
               {nullptr, p.packed, bias, p.rows, p.depth, p.width, 0, p.width, p.gelu, static_cast<T*>(p.out), nullptr},
               p.threads);
}

// Panels of signed bytes, each followed by the scales and the sums of its columns.
template <typename T>
void pack(const Params& p) {
  using F = Bytes<T>;
  const int64_t words = row_words<F>(p.depth), panels = round_up(p.width, kPanel) / kPanel;
  Scratch scratch;
  const PerThread<PackRoom> rooms(scratch, p.threads, words);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.threads > 1)
  for (int64_t i = 0; i < panels * kPanel / kLanes; ++i) {
    uint32_t* work = rooms.own().rows;
    const int64_t first = i * kLanes / kPanel * kPanel, lane = i * kLanes - first;
    uint32_t* panel = p.pack_into + first * tailed_words<F>(p.depth) + lane;
    const uint32_t* rows[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      rows[r] = work + r * words;
      Tail tail{0.0f, 0};
      std::memset(work + r * words, 0, static_cast<size_t>(words) * sizeof(uint32_t));
      const int64_t from = i * kLanes + r;
      if (from < p.width)
        tail = to_signed(static_cast<const T*>(p.weight) + from * p.depth, p.depth, 0,
                         reinterpret_cast<uint8_t*>(work + r * words));
      std::memcpy(panel + words * kPanel + r, &tail.scale, sizeof tail.scale);
      std::memcpy(panel + (words + 1) * kPanel + r, &tail.number, sizeof tail.number);
    }
    for (int64_t c = 0; c < words; c += kLanes) transpose16(rows, c, panel + c * kPanel, kPanel);
  }
}

}  // namespace

void linear_int8_words(const Params& p) {
  p.words[0] = weight_words<Bytes<float>>(p.width, p.depth);
  p.words[1] = tailed_words<Bytes<float>>(p.depth);
}

void linear_int8_pack(const Params& p) {
  with_type(p.dtype, [&](auto type) { pack<decltype(type)>(p); });
}

void linear_int8_forward(const Params& p) {
  with_type(p.dtype, [&](auto type) { forward<decltype(type)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
