// A matrix whose values lie apart, in fp32 or bf16, as packed values of either.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace uvg {

inline void convert(const float& from, float& to) { to = from; }
inline void convert(const BFloat16& from, BFloat16& to) { to = from; }
inline void convert(const BFloat16& from, float& to) {
  const uint32_t bits = uint32_t{from.bits} << 16;
  std::memcpy(&to, &bits, sizeof to);
}
inline void convert(const float& from, BFloat16& to) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits = 0;
  std::memcpy(&bits, &from, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  to.bits = static_cast<uint16_t>(from != from ? quiet : rounded);
}

struct PackValuesParams {
  const void* from;
  int64_t rows, width, row_step, step;  // steps in values
  Dtype dtype_from, dtype_to;
  void* to;  // [rows, width]
};

template <typename From, typename To>
void pack_values_as(const PackValuesParams& p) {
  const auto* from = static_cast<const From*>(p.from);
  auto* to = static_cast<To*>(p.to);
  for (int64_t r = 0; r < p.rows; ++r) {
    const From* row = from + r * p.row_step;
    for (int64_t i = 0; i < p.width; ++i) convert(row[i * p.step], to[r * p.width + i]);
  }
}

template <typename From>
void pack_values_from(const PackValuesParams& p) {
  p.dtype_to == Dtype::kFloat32 ? pack_values_as<From, float>(p) : pack_values_as<From, BFloat16>(p);
}

inline void pack_values(const PackValuesParams& p) {
  p.dtype_from == Dtype::kFloat32 ? pack_values_from<float>(p) : pack_values_from<BFloat16>(p);
}

}  // namespace uvg
