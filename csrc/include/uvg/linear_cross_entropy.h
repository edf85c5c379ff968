// Loss per row of softmax(x weight^T + bias) against a target: cross-entropy, or generalised KL where `current` and
// `rate` are given. All arrays are packed.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/dtype.h"

namespace uvg {

struct LinearCrossEntropyParams {
  const void* x;           // [rows, width]
  const void* weight;      // [vocab, width]
  const void* bias;        // [vocab]
  const int64_t* target;   // [rows]
  const int64_t* current;  // [rows] or null
  const float* rate;       // [rows] or null
  int64_t rows, width, vocab;
  Dtype dtype;
  int threads;
  float* loss;         // [rows], forward
  float* lse;          // [rows], written by the forward, read by the backward
  float* p_current;    // [rows] where current is given, likewise
  const float* dloss;  // [rows], backward
  void* dx;            // in dtype, as what they belong to
  void* dweight;
  void* dbias;
};

UVG_KERNEL(linear_cross_entropy_forward, LinearCrossEntropyParams)
UVG_KERNEL(linear_cross_entropy_backward, LinearCrossEntropyParams)

}  // namespace uvg
