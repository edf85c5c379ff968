// The gate of the rows of one span.
#pragma once

#include "cpu/vec.h"

namespace uvg {
namespace UVG_ISA {

// Without gates it is 1; a row that no span covers has gate 0, as in the reference.
struct Gate {
  const float* values;
  float constant;

  Gate(const float* gates, int64_t span, int64_t width)
      : values(gates != nullptr && span >= 0 ? gates + span * width : nullptr),
        constant(gates == nullptr ? 1.0f : 0.0f) {}

  Vec at(int64_t i, int64_t n) const { return values == nullptr ? splat(constant) : load(values + i, n); }
};

}  // namespace UVG_ISA
}  // namespace uvg
