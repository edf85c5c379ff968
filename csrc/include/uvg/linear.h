// out = act(x W^T + b). A weight is packed first: linear_words tells the room, linear_pack fills it, for the
// instruction set in use; or, where linear_packs_panels tells so of the rows, in the product itself. Rows of x and out
// lie x_row, out_row values apart; all else is packed.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct LinearParams {
  const void* x;       // [rows, depth]
  const void* weight;  // [width, depth]; read by linear_pack, and where packed is null
  const void* bias;    // [width] or null
  const uint32_t* packed;
  int64_t rows, depth, width, x_row, out_row;
  bool gelu;    // act is GELU in its tanh form, not nothing
  Dtype dtype;  // of all but packed
  int threads;
  void* out;            // [rows, width]
  void* pre;            // [rows, width]: before act, or null
  uint32_t* pack_into;  // linear_pack
  int64_t* words;       // linear_words; linear_packs_panels: 1 or 0
};

// Gradients of a product x W^T + b. All arrays but x, weight and dweight are packed.
struct LinearBackwardParams {
  const void* dz;      // [rows, width]: gradient of the result
  const void* x;       // [rows, depth], rows x_row values apart
  const void* weight;  // [width, depth]; its rows and those of dweight lie weight_row values apart
  int64_t rows, depth, width, x_row, weight_row;
  bool gelu;    // the product was with GELU (tanh form) of x; dx is the gradient before it
  Dtype dtype;  // of all arrays
  int threads;
  void *dx, *dweight;
  void* dbias;             // [width] or null
  const float* dx_before;  // [rows, depth]: sums of earlier parts of the width, which dx adds to, or null
  float* dx_so_far;        // [rows, depth]: takes the sums in place of dx, where parts follow, or null
};

// dz = dy * GELU'(pre) with GELU in its tanh form.
struct GeluBackwardParams {
  const void *dy, *pre;  // [size]
  int64_t size;
  Dtype dtype;  // of all arrays
  int threads;
  void* dz;
};

UVG_KERNEL(linear_words, LinearParams)
UVG_KERNEL(linear_pack, LinearParams)
UVG_KERNEL(linear_packs_panels, LinearParams)
UVG_KERNEL(linear_forward, LinearParams)
UVG_KERNEL(linear_backward, LinearBackwardParams)
UVG_KERNEL(gelu_backward, GeluBackwardParams)

}  // namespace uvg
