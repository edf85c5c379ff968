// Top-k routing: the most probable experts of a row and their probabilities, renormalised to sum to one.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct MoeRouteParams {
  const void* logits;  // [rows, experts] in dtype; forward only
  int64_t rows, experts, top_k;
  Dtype dtype;
  int threads;
  float* weights;         // [rows, top_k], the most probable first
  int32_t* chosen;        // [rows, top_k]
  const float* dweights;  // [rows, top_k]; backward
  void* dlogits;          // [rows, experts] in dtype; backward
};

UVG_KERNEL(moe_route_forward, MoeRouteParams)
UVG_KERNEL(moe_route_backward, MoeRouteParams)
UVG_CUDA_KERNEL(moe_route_forward, MoeRouteParams)
UVG_CUDA_KERNEL(moe_route_backward, MoeRouteParams)

}  // namespace uvg
