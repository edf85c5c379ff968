// act(x W^T + b) in bytes: rows of x are quantised, then multiplied as gemm.h does it.
#pragma once

#include "cpu/gemm.h"

namespace uvg {
namespace UVG_ISA {

// Quantises p.rows rows of x, which lie x_row values apart, into `room`, [rows, tailed_words]; p.x and p.x_row are set.
template <typename T>
void gemm_int8(const T* x, int64_t x_row, uint32_t* room, Product<Bytes<T>> p, int threads) {
  const int64_t words = row_words<Bytes<T>>(p.depth), row = tailed_words<Bytes<T>>(p.depth);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t r = 0; r < p.rows; ++r) {
    uint32_t* to = room + r * row;
    const Tail tail = to_unsigned(x + r * x_row, p.depth, reinterpret_cast<uint8_t*>(to));
    std::memcpy(to + words, &tail, sizeof tail);
  }
  p.x = reinterpret_cast<const uint8_t*>(room), p.x_row = row * 4;
  gemm(p, threads);
}

}  // namespace UVG_ISA
}  // namespace uvg
