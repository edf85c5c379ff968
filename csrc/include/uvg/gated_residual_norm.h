// out = h + gate * y and normed = (LN(out) * weight + bias) * (1 + scale) + shift, one gate, shift and scale per span.
// All arrays are packed.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct GatedResidualNormParams {
  const void* h;       // [rows, width] in dtype_h; forward only
  const void* y;       // [rows, width] in dtype_y
  const float* gate;   // [spans, width] or null
  const float* shift;  // [spans, width]; shift and scale are both given or both null
  const float* scale;
  const int32_t* spans;  // [spans, 2], null where there is none of the three
  const float* weight;   // [width] or null
  const float* bias;
  int64_t rows, width, num_spans;
  float eps;
  Dtype dtype_h, dtype_y, dtype_normed;
  int threads;
  void* out;     // [rows, width] in dtype_h, written by the forward, read by the backward
  void* normed;  // forward, dtype_normed
  float* mean;   // [rows], written by the forward, read by the backward
  float* rstd;
  const void* dout;     // backward, dtype_h: gradient of out alone
  const void* dnormed;  // dtype_normed
  void* dh;             // dtype_h
  void* dy;             // dtype_y
  float* dgate;         // where the parameter is given
  float* dshift;
  float* dscale;
  float* dweight;
  float* dbias;
  float* row_means;  // cuda backward: [rows, 2] to work in
  float* partial;    // cuda backward: [rows / 64 + max(spans, 1), 2, width] to work in
};

UVG_KERNEL(gated_residual_norm_forward, GatedResidualNormParams)
UVG_KERNEL(gated_residual_norm_backward, GatedResidualNormParams)
UVG_CUDA_KERNEL(gated_residual_norm_forward, GatedResidualNormParams)
UVG_CUDA_KERNEL(gated_residual_norm_backward, GatedResidualNormParams)

}  // namespace uvg
