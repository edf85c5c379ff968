// One categorical draw per row from softmax((x weight^T + bias) / temperature). All arrays are packed.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct LinearSampleParams {
  const void* x;                          // [rows, width]
  const void* weight;                     // [vocab, width]
  const void* bias;                       // [vocab]
  const int64_t *seeds, *steps, *tokens;  // [rows], the name of a row's draw
  int64_t rows, width, vocab;
  double temperature;  // 0: argmax
  Dtype dtype;
  int threads;
  int64_t* ids;    // [rows]; -1 where a row has no distribution
  float* weighed;  // cuda: [rows, panels of 64 words, 2] to work in
};

UVG_KERNEL(linear_sample, LinearSampleParams)
UVG_CUDA_KERNEL(linear_sample_forward, LinearSampleParams)

}  // namespace uvg
