// One sampling step of both streams: guidance and a linear solver step on latents, coin and jump on tokens. The
// equations stand in uvg_engine/ops/flow_step.py. All arrays are packed.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct FlowStepParams {
  const void *x, *v_cond;                 // [num_latents] in dtype
  const void *v_uncond, *last, *m1, *m2;  // the same, or null
  const float* guidance;                  // [samples]
  const float* coefs;                     // [samples, 10]; 0 drops its term, also one that is null
  const int32_t* latent_spans;            // [samples, 2]
  const int64_t *tokens, *drawn;          // [num_tokens]; drawn is read only where the coin says jump
  const float* jump_prob;                 // [samples]
  const int64_t *seeds, *steps;           // [samples]
  const int32_t* token_spans;             // [samples, 2]
  int64_t num_latents, num_tokens, samples;
  Dtype dtype;
  int threads;
  void *x_next, *corrected, *estimate;  // [num_latents] in dtype
  int64_t* tokens_next;                 // [num_tokens]
};

UVG_KERNEL(flow_step_forward, FlowStepParams)
UVG_CUDA_KERNEL(flow_step_forward, FlowStepParams)

}  // namespace uvg
