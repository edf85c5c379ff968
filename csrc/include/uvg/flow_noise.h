// Corruption of both streams: x = (1-sigma)*data + sigma*noise, velocity = noise - data; a token is kept where
// u < kappa, else it is the source. All arrays are packed.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct FlowNoiseParams {
  const void* data;             // [num_latents] in dtype
  const int64_t* tokens;        // [num_tokens]
  const float *sigma, *kappa;   // [samples]
  const int64_t* seeds;         // [samples]
  const int32_t* latent_spans;  // [samples, 2]
  const int32_t* token_spans;   // [samples, 2]
  int64_t num_latents, num_tokens, samples, step;
  int64_t vocab, mask_id;  // mask_id -1: the source is uniform over [0, vocab)
  Dtype dtype;
  int threads;
  void *x, *velocity;  // [num_latents] in dtype
  int64_t* noisy;      // [num_tokens]
};

UVG_KERNEL(flow_noise_forward, FlowNoiseParams)
UVG_CUDA_KERNEL(flow_noise_forward, FlowNoiseParams)

}  // namespace uvg
