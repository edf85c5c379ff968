// Expert outputs weighed and summed back to their rows; slots, order and places as in moe_dispatch.h. All arrays are
// packed.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct MoeCombineParams {
  const void* grouped;   // [rows * top_k, width] in dtype
  const int32_t* order;  // [rows * top_k], a permutation
  const float* weights;  // [rows, top_k]
  int64_t rows, width, top_k;
  Dtype dtype;
  int threads;
  int32_t* places;   // [rows * top_k]: memory to work in; cuda: forward
  void* out;         // [rows, width] in dtype; forward
  const void* dout;  // [rows, width] in dtype; backward
  void* dgrouped;    // [rows * top_k, width] in dtype; backward
  float* dweights;   // [rows, top_k]; backward
};

UVG_KERNEL(moe_combine_forward, MoeCombineParams)
UVG_KERNEL(moe_combine_backward, MoeCombineParams)
UVG_CUDA_KERNEL(moe_combine_forward, MoeCombineParams)
UVG_CUDA_KERNEL(moe_combine_backward, MoeCombineParams)

}  // namespace uvg
