// RMS norm of q and k over the full width, then rotary positions per head. All arrays are packed.
// weight[1] may be nullptr: there is no k. Without spans nothing is rotated.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct QkNormRopeParams {
  const void* x[2];        // q, k: [rows, width]
  const float* weight[2];  // [width]
  const int32_t* spans;    // [spans, 6]: start, len, kind (0 video, 1 text), F, Y, X
  const float* table;      // [2, positions, head / 2, 2]: cos and sin of kind, position, pair
  int64_t rows, width, heads, num_spans, positions;
  float eps;
  Dtype dtype;
  int threads;
  float* rstd[2];     // [rows], written by the forward, read by the backward
  void* y[2];         // forward
  const void* dy[2];  // backward
  void* dx[2];
  float* dweight[2];
  float* partial;  // cuda backward: [rows / 64 + 1, width] to work in
};

UVG_KERNEL(qk_norm_rope_forward, QkNormRopeParams)
UVG_KERNEL(qk_norm_rope_backward, QkNormRopeParams)
UVG_CUDA_KERNEL(qk_norm_rope_forward, QkNormRopeParams)
UVG_CUDA_KERNEL(qk_norm_rope_backward, QkNormRopeParams)

}  // namespace uvg
