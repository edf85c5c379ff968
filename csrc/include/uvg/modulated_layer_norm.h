// y = (LN(x) * weight + bias) * (1 + scale) + shift, one (shift, scale) per span. All arrays are packed.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct ModulatedLayerNormParams {
  const void* x;       // [rows, width]
  const float* shift;  // [spans, width]; shift and scale are both given or both null
  const float* scale;
  const int32_t* spans;  // [spans, 2]
  const float* weight;   // [width] or null
  const float* bias;
  int64_t rows, width, num_spans;
  float eps;
  Dtype dtype;  // of x, y, dy, dx
  int threads;
  float* mean;  // [rows], written by the forward, read by the backward
  float* rstd;
  void* y;         // forward
  const void* dy;  // backward
  void* dx;
  float* dshift;  // where the parameter is given
  float* dscale;
  float* dweight;
  float* dbias;
  float* partial;  // cuda backward: [rows / 64 + max(spans, 1), 2, width] to work in
};

UVG_KERNEL(modulated_layer_norm_forward, ModulatedLayerNormParams)
UVG_KERNEL(modulated_layer_norm_backward, ModulatedLayerNormParams)
UVG_CUDA_KERNEL(modulated_layer_norm_forward, ModulatedLayerNormParams)
UVG_CUDA_KERNEL(modulated_layer_norm_backward, ModulatedLayerNormParams)

}  // namespace uvg
