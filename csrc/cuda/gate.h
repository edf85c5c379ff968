// The gate of the residual ops.
#pragma once

#include "cuda/rows.h"

namespace uvg::cuda {

// The gate of a row at some columns: one without a gate at all, zero where no span covers the row, as in the reference.
template <int kVector, typename Params>
UVG_DEVICE void load_gate(float (&gate)[kVector], const Params& p, int64_t span, int64_t column) {
  if (p.gate != nullptr && span >= 0) return load_vector(gate, p.gate + span * p.width + column);
#pragma unroll
  for (int i = 0; i < kVector; ++i) gate[i] = p.gate == nullptr ? 1.0f : 0.0f;
}

}  // namespace uvg::cuda
