// Linear, GELU (tanh form), Linear by experts over contiguous groups of rows, the products in bytes. Weights as
// linear_int8_pack makes them, one expert after the other.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct MoeMlpInt8Params {
  const void* x;            // [rows, width], rows x_row values apart
  const uint32_t *w1, *w2;  // [experts] times linear_int8_words of [hidden, width], of [width, hidden]
  const void *b1, *b2;      // [experts, hidden], [experts, width]
  const int64_t* offsets;   // [experts + 1]: rows [offsets[e], offsets[e + 1]) are expert e's
  int64_t experts, width, hidden, x_row;
  Dtype dtype;
  int threads;
  void* room;  // [room_rows, hidden]: hidden rows between the two products
  int64_t room_rows;
  uint32_t* bytes;  // [room_rows] quantised rows of `width` or of `hidden` values
  void* y;          // [rows, width]
};

UVG_KERNEL(moe_mlp_int8_forward, MoeMlpInt8Params)

}  // namespace uvg
