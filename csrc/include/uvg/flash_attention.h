// Softmax attention of each sample over its own rows. q-like arrays are [rows_q, heads, width], k-like ones
// [rows_k, heads, width], all in dtype and packed; lse is [heads, rows_q], natural log.
#pragma once

#include <cstdint>

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

}  // namespace uvg
