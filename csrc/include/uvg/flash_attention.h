// Softmax attention of each sample over its own rows. q-like arrays are [rows_q, heads, width], k-like ones
// [rows_k, heads, width], all in dtype and packed; lse is [heads, rows_q], natural log.
#pragma once

#include <cstdint>

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "common/dtype.h"
#include "common/row_lists.h"

namespace uvg {

struct FlashAttentionParams {
  const void *q, *k, *v;
  const RowLists *queries, *keys;  // the same samples
  int64_t rows_q, rows_k, heads, width;
  float scale;
  Dtype dtype;
  int threads;
  void* out;  // read by the backward
  float* lse;
  const void* dout;  // backward
  void *dq, *dk, *dv;
};

UVG_KERNEL(flash_attention_forward, FlashAttentionParams)
UVG_KERNEL(flash_attention_backward, FlashAttentionParams)

// The same for csrc/cuda: bf16 or fp16, width a multiple of 8 up to 128, rows aligned to 16 bytes; spans stay on the
// device.
struct FlashAttentionCudaParams {
  const void *q, *k, *v;
  const int32_t *q_spans, *k_spans;  // [samples, spans_q, 2], [samples, spans_k, 2]
  int64_t samples, spans_q, spans_k, rows_q, rows_k, heads, width;
  float scale;
  Dtype dtype;
  void* out;   // the forward writes the rows that have keys
  float* lse;  // the same
  const void* dout;
  float* delta;        // backward: [heads, rows_q] to work in
  void *dq, *dk, *dv;  // dq: the rows that have keys; dk, dv: all
};

UVG_CUDA_KERNEL(flash_attention_forward, FlashAttentionCudaParams)
UVG_CUDA_KERNEL(flash_attention_backward, FlashAttentionCudaParams)

}  // namespace uvg
