// Linear, GELU (tanh form), Linear by experts over contiguous groups of rows. All arrays are packed; weights as
// linear_pack makes them, one expert after the other. The backward is linear_backward, twice for
// each part of an expert's hidden width.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct MoeMlpParams {
  const void* x;            // [rows, width], rows x_row values apart
  const uint32_t *w1, *w2;  // [experts] times linear_words of [hidden, width], of [width, hidden]
  const void *b1, *b2;      // [experts, hidden], [experts, width]
  const int64_t* offsets;   // [experts + 1]: rows [offsets[e], offsets[e + 1]) are expert e's
  int64_t experts, width, hidden, x_row;
  Dtype dtype;
  int threads;
  void* room;  // [room_rows, hidden]: hidden rows between the two products
  int64_t room_rows;
  void* y;    // [rows, width]
  void* pre;  // [rows, hidden]: hidden values before GELU, or null; the backward reads it
};

UVG_KERNEL(moe_mlp_forward, MoeMlpParams)

}  // namespace uvg
