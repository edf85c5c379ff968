// out = act(x W^T + b), the product in bytes: rows of x quantised in every call, W once, by linear_int8_pack.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct LinearInt8Params {
  const void* x;       // [rows, depth], rows x_row values apart
  const void* weight;  // [width, depth]; read by linear_int8_pack alone
  const void* bias;    // [width] or null
  const uint32_t* packed;
  int64_t rows, depth, width, x_row;
  bool gelu;    // act is GELU in its tanh form, not nothing
  Dtype dtype;  // of x, weight, bias, out
  int threads;
  uint32_t* room;       // [rows] times words[1]: quantised rows
  void* out;            // [rows, width]
  uint32_t* pack_into;  // linear_int8_pack
  int64_t* words;       // linear_int8_words: [2], of a packed weight, of a quantised row of x
};

UVG_KERNEL(linear_int8_words, LinearInt8Params)
UVG_KERNEL(linear_int8_pack, LinearInt8Params)
UVG_KERNEL(linear_int8_forward, LinearInt8Params)

}  // namespace uvg
