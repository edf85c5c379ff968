// A matrix whose values lie apart, in fp32, bf16 or fp16, as packed values of either.
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

inline void convert(const Float16& from, Float16& to) { to = from; }
inline void convert(const Float16& from, float& to) {
  const uint32_t sign = uint32_t{from.bits} >> 15 << 31, number = from.bits & 0x7FFFU;
  uint32_t bits = (number << 13) + (number < 0x7C00 ? 112U << 23 : 224U << 23);
  if (number < 0x400) {  // subnormal: the fp32 unit gives it its exponent
    float value = static_cast<float>(number) * 0x1p-24F;
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&to, &bits, sizeof to);
}
inline void convert(const float& from, Float16& to) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits = 0;
  std::memcpy(&bits, &from, sizeof bits);
  const uint32_t sign = bits >> 31 << 15, number = bits & 0x7FFFFFFF;
  uint32_t half = number > 0x7F800000 ? 0x7E00 : 0x7C00;
  if (number < 113U << 23) {  // what is subnormal is rounded by an fp32 addition
    float value = 0;
    std::memcpy(&value, &number, sizeof value);
    value += 0.5F;
    std::memcpy(&half, &value, sizeof half);
    half -= 0x3F000000;
  } else if (number < 143U << 23) {
    half = (number - (112U << 23) + 0xFFF + ((number >> 13) & 1)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
}
inline void convert(const BFloat16& from, Float16& to) {
  float value = 0;
  convert(from, value), convert(value, to);
}
inline void convert(const Float16& from, BFloat16& to) {
  float value = 0;
  convert(from, value), convert(value, to);
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
  if (p.dtype_to == Dtype::kFloat32) return pack_values_as<From, float>(p);
  p.dtype_to == Dtype::kBFloat16 ? pack_values_as<From, BFloat16>(p) : pack_values_as<From, Float16>(p);
}

inline void pack_values(const PackValuesParams& p) {
  if (p.dtype_from == Dtype::kFloat32) return pack_values_from<float>(p);
  p.dtype_from == Dtype::kBFloat16 ? pack_values_from<BFloat16>(p) : pack_values_from<Float16>(p);
}

}  // namespace uvg
