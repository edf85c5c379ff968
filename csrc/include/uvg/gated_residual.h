// out = h + gate * y, one gate per span (none: 1). All arrays are packed.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct GatedResidualParams {
  const void* h;         // [rows, width] in dtype_h; forward only
  const void* y;         // [rows, width] in dtype_y
  const float* gate;     // [spans, width] or null
  const int32_t* spans;  // [spans, 2]
  int64_t rows, width, num_spans;
  Dtype dtype_h, dtype_y;
  int threads;
  void* out;         // forward, dtype_h
  const void* dout;  // backward, dtype_h
  void* dy;          // dtype_y
  float* dgate;      // where there is a gate
  float* partial;    // cuda, with dgate: [rows / 64 + spans, width] to work in
};

UVG_KERNEL(gated_residual_forward, GatedResidualParams)
UVG_KERNEL(gated_residual_backward, GatedResidualParams)
UVG_CUDA_KERNEL(gated_residual_forward, GatedResidualParams)
UVG_CUDA_KERNEL(gated_residual_backward, GatedResidualParams)

}  // namespace uvg
