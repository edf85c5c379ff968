// Gradients of a product of very few fp32 rows, weight and its gradient in one pass each as they lie. The bits are
// those of the products in linear_backward.cpp: each sum runs in the same order.
#pragma once

#include "cpu/gemm.h"
#include "uvg/linear.h"

namespace uvg {
namespace UVG_ISA {

constexpr int64_t kVeryFew = 4;       // rows
constexpr int64_t kFewColumns = 512;  // whose sums stay in the first-level cache
constexpr int64_t kFewAtOnce = 4;     // rows of the weight that a sum takes up between load and store

// sums [kFewColumns] of a row += dz[k] * row k of the weight, for kCount of them.
template <int64_t kCount>
UVG_INLINE void take_up(float* sums, const float* dz, const float* weight, int64_t weight_row, int64_t columns) {
  Vec factors[kCount];
#pragma GCC unroll 4
  for (int64_t k = 0; k < kCount; ++k) factors[k] = splat(dz[k]);
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vec sum = load(sums + c);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kCount; ++k) sum = multiply_add(factors[k], load(weight + k * weight_row + c), sum);
    store(sums + c, sum);
  }
}

// dx of `columns` columns, kFewColumns at the most, from `first` on.
inline void x_of_few(const LinearBackwardParams& p, int64_t first, int64_t columns) {
  float total[kVeryFew * kFewColumns], part[kVeryFew * kFewColumns];
  const auto* dz = static_cast<const float*>(p.dz);
  const auto* weight = static_cast<const float*>(p.weight) + first;
  constexpr int64_t kBlock = kDepthBlock<Singles<float>>;
  const int64_t blocks = p.width > 0 ? (p.width + kBlock - 1) / kBlock : 1;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = p.width * (b + 1) / blocks;
    float* sums = b == 0 ? total : part;
    std::memset(sums, 0, sizeof total);
    for (int64_t k = p.width * b / blocks; k < end;) {
      const int64_t count = end - k >= kFewAtOnce ? kFewAtOnce : 1;
      const auto take = count == 1 ? take_up<1> : take_up<kFewAtOnce>;
      for (int64_t r = 0; r < p.rows; ++r)
        take(sums + r * kFewColumns, dz + r * p.width + k, weight + k * p.weight_row, p.weight_row, columns);
      k += count;
    }
    for (int64_t i = 0; b > 0 && i < p.rows * kFewColumns; i += kLanes)
      store(total + i, load(total + i) + load(part + i));
  }
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t c = 0; c < columns; c += kLanes)
      store(static_cast<float*>(p.dx) + r * p.depth + first + c, load(total + r * kFewColumns + c) + Vec{});  // -0: 0
}

// Row f of the weight's gradient.
inline void weight_row_of_few(const LinearBackwardParams& p, int64_t f) {
  const auto* x = static_cast<const float*>(p.x);
  Vec factors[kVeryFew];
  for (int64_t r = 0; r < p.rows; ++r) factors[r] = splat(static_cast<const float*>(p.dz)[r * p.width + f]);
  for (int64_t c = 0; c < p.depth; c += kLanes) {
    Vec sum = {};
    for (int64_t r = 0; r < p.rows; ++r) sum = multiply_add(factors[r], load(x + r * p.x_row + c), sum);
    store(static_cast<float*>(p.dweight) + f * p.weight_row + c, sum);
  }
}

inline void gradients_of_few(const LinearBackwardParams& p) {
  const int threads = p.width * p.depth <= kAloneRowValues ? 1 : p.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < p.depth; first += kFewColumns)
      x_of_few(p, first, p.depth - first < kFewColumns ? p.depth - first : kFewColumns);
#pragma omp for schedule(static)
    for (int64_t f = 0; f < p.width; ++f) weight_row_of_few(p, f);
  }
  if (p.dbias == nullptr) return;
  columns(p.width, [&](int64_t i, int64_t n) {
    const auto* dz = static_cast<const float*>(p.dz) + i;
    Vec sum = Vec{} + load(dz, n), rest = {};  // the first row by itself, as sums of many rows begin
    for (int64_t r = 1; r < p.rows; ++r) rest += load(dz + r * p.width, n);
    store(static_cast<float*>(p.dbias) + i, sum + rest, n);
  });
}

}  // namespace UVG_ISA
}  // namespace uvg
