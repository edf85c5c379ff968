// Rows copied into one contiguous group per expert, and the gradient of that. Slot t*top_k + k is the k-th choice of
// row t; order[r] is the slot that stands in grouped row r, places its inverse. All arrays are packed.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct MoeDispatchParams {
  const void* x;          // [rows, width] in dtype; forward
  const int32_t* chosen;  // [rows, top_k] in [0, experts); forward
  int64_t rows, width, experts, top_k;
  Dtype dtype;
  int threads;
  void* grouped;         // [rows * top_k, width] in dtype: by expert, then row, then choice
  int32_t* offsets;      // [experts + 1]: rows of expert e are [offsets[e], offsets[e + 1])
  int32_t* order;        // [rows * top_k]; the backward reads it
  int32_t* places;       // [rows * top_k]: memory to work in
  const void* dgrouped;  // [rows * top_k, width] in dtype; backward
  void* dx;              // [rows, width] in dtype; backward
};

UVG_KERNEL(moe_dispatch_forward, MoeDispatchParams)
UVG_KERNEL(moe_dispatch_backward, MoeDispatchParams)
UVG_CUDA_KERNEL(moe_dispatch_forward, MoeDispatchParams)
UVG_CUDA_KERNEL(moe_dispatch_backward, MoeDispatchParams)

}  // namespace uvg
