// Numbers: conversions between storage and fp32, and the special functions of the device.
#pragma once

#include "common/gpu.h"

#if UVG_SIMULATE
#include <cmath>
#endif

namespace uvg::gpu {

UVG_DEVICE uint32_t bits_of(float value) {
#if UVG_SIMULATE
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#else
  return __float_as_uint(value);
#endif
}

UVG_DEVICE float float_of(uint32_t bits) {
#if UVG_SIMULATE
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#else
  return __uint_as_float(bits);
#endif
}

UVG_DEVICE float to_float(float value) { return value; }

UVG_DEVICE float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

UVG_DEVICE float to_float(Float16 value) {
#if UVG_SIMULATE
  return sim::from_fp16(value.bits);
#else
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
#endif
}

// Rounded to nearest, ties to even.
template <typename T>
UVG_DEVICE T from_float(float value);

template <>
UVG_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
UVG_DEVICE BFloat16 from_float<BFloat16>(float value) {
#if UVG_SIMULATE
  return {sim::to_bf16(value)};
#else
  BFloat16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
#endif
}

template <>
UVG_DEVICE Float16 from_float<Float16>(float value) {
#if UVG_SIMULATE
  return {sim::to_fp16(value)};
#else
  Float16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
#endif
}

// Two values as one register, `low` in the lower half: what `multiply` takes.
template <typename T>
UVG_DEVICE uint32_t pack(float low, float high) {
#if UVG_SIMULATE
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
#else
  uint32_t out;
  if constexpr (T::kIsBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  }
  return out;
#endif
}

// 2^x within two ulps; exp2(-inf) = 0.
UVG_DEVICE float exp2(float x) {
#if UVG_SIMULATE
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log2(x) within about one ulp of the largest of 1 and the result.
UVG_DEVICE float log2(float x) {
#if UVG_SIMULATE
  return std::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / sqrt(x), correctly rounded steps.
UVG_DEVICE float reciprocal_sqrt(float x) {
#if UVG_SIMULATE
  return 1.0f / std::sqrt(x);
#else
  return __frcp_rn(__fsqrt_rn(x));
#endif
}

UVG_DEVICE float square_root(float x) {
#if UVG_SIMULATE
  return std::sqrt(x);
#else
  return __fsqrt_rn(x);
#endif
}

// e^x within an ulp, where exp2 of a product would lose digits with x.
UVG_DEVICE float exp(float x) {
#if UVG_SIMULATE
  return std::exp(x);
#else
  return ::expf(x);
#endif
}

// ln(x) within an ulp also near 1, where log2 keeps no digits.
UVG_DEVICE float log(float x) {
#if UVG_SIMULATE
  return std::log(x);
#else
  return ::logf(x);
#endif
}

// Sine and cosine of `turns` whole turns, within two ulps.
UVG_DEVICE void sine_cosine(float turns, float& sine, float& cosine) {
#if UVG_SIMULATE
  const double angle = 6.283185307179586 * turns;
  sine = static_cast<float>(std::sin(angle)), cosine = static_cast<float>(std::cos(angle));
#else
  ::sincospif(2.0f * turns, &sine, &cosine);
#endif
}

// How many bits are set.
UVG_DEVICE int count_bits(uint32_t bits) {
#if UVG_SIMULATE
  return __builtin_popcount(bits);
#else
  return __popc(bits);
#endif
}

UVG_DEVICE float max(float a, float b) { return a > b ? a : b; }
UVG_DEVICE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace uvg::gpu
