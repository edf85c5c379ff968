// The elementwise half of moe_mlp: GELU (tanh form) between the two products of an expert. All arrays are packed.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct MoeMlpParams {
  const void* pre;  // [size] in dtype: the hidden values before GELU
  int64_t size;
  Dtype dtype;
  int threads;
  void* hidden;         // gelu(pre)
  const void* dhidden;  // backward
  void* dpre;           // backward; may be dhidden
};

UVG_KERNEL(moe_mlp_activate, MoeMlpParams)
UVG_KERNEL(moe_mlp_activate_backward, MoeMlpParams)  // writes hidden again as well

}  // namespace uvg
