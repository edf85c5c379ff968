// Sixteen Philox4x32-10 draws at once, and what is made of their words. The words are those of common/philox.h, which
// is inline for all instruction sets and therefore not used here.
#pragma once

#include "common/philox.h"
#include "cpu/rows.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace uvg {
namespace UVG_ISA {

struct Words {
  VecBits w[4];
};

// High and low halves of the products with `factor`.
inline void multiply(VecBits x, uint32_t factor, VecBits& high, VecBits& low) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_set1_epi64(factor), all = (__m512i)x;
  const __m512i even = _mm512_mul_epu32(all, wide), odd = _mm512_mul_epu32(_mm512_srli_epi64(all, 32), wide);
  high = (VecBits)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  low = (VecBits)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
#else
  uint32_t from[kLanes], highs[kLanes];
  to_memory(from, x);
  for (int i = 0; i < kLanes; ++i) highs[i] = static_cast<uint32_t>(uint64_t{from[i]} * factor >> 32);
  high = from_memory<VecBits>(highs);
  low = x * factor;
#endif
}

// The keys of the rounds, of one seed.
struct RoundKeys {
  uint32_t low[10], high[10];

  explicit RoundKeys(int64_t seed) {
    auto key_low = static_cast<uint32_t>(seed), key_high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < 10; ++round) {
      low[round] = key_low, high[round] = key_high;
      key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
    }
  }
};

// Draws (step, stream, token + 0..15, 0) under a key, and the sixteen after them, kCount times: side by side, as a
// round waits for the one before it.
template <int64_t kCount>
UVG_INLINE void philox(const RoundKeys& keys, int64_t step, PhiloxStream stream, int64_t token, Words (&out)[kCount]) {
  const VecBits lane = from_memory<VecBits>(kCounted);
  const VecBits zero = {};
  each<kCount>([&](auto k) UVG_INLINED {
    out[k] = {{zero + static_cast<uint32_t>(step), zero + static_cast<uint32_t>(stream),
               lane + static_cast<uint32_t>(token + k * kLanes), zero}};
  });
  for (int round = 0; round < 10; ++round) {
    each<kCount>([&](auto k) UVG_INLINED {
      VecBits high_a, low_a, high_c, low_c;
      VecBits(&w)[4] = out[k].w;
      multiply(w[0], 0xD2511F53u, high_a, low_a);
      multiply(w[2], 0xCD9E8D57u, high_c, low_c);
      w[0] = high_c ^ w[1] ^ keys.low[round], w[1] = low_c;
      w[2] = high_a ^ w[3] ^ keys.high[round], w[3] = low_a;
    });
  }
}

inline Words philox(int64_t seed, int64_t step, PhiloxStream stream, int64_t token) {
  Words out[1];
  philox(RoundKeys(seed), step, stream, token, out);
  return out[0];
}

// Odd multiples of 2^-24 in (0, 1), exact.
inline Vec uniform(VecBits word) { return convert<Vec>(as<VecInts>(2 * (word >> 9) + 1)) * 0x1p-24f; }

inline VecBits integers(VecBits word, uint32_t below) {
  VecBits high, low;
  multiply(word, below, high, low);
  return high;
}

inline Vec sqrt(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#else
  float lanes[kLanes];
  store(lanes, x);
  for (float& lane : lanes) lane = __builtin_sqrtf(lane);
  return load(lanes);
#endif
}

// Natural logarithm of a normal number, within 1.5 ulps also next to 1: m in [sqrt 1/2, sqrt 2) times a power of two,
// then x - x^2/2 + x^3 P(x) with x = m - 1 (least maximum error, degree 7).
inline Vec log(Vec value) {
  const auto bits = as<VecBits>(value) - 0x3F3504F3u;  // the bits of sqrt 1/2
  const Vec exponent = convert<Vec>(as<VecInts>(bits) >> 23);
  const Vec x = as<Vec>((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  Vec p = splat(-7.8595980e-2f);
  p = p * x + 1.2881638e-1f;
  p = p * x - 1.3128755e-1f;
  p = p * x + 1.4181193e-1f;
  p = p * x - 1.6624554e-1f;
  p = p * x + 2.0002286e-1f;
  p = p * x - 2.5000810e-1f;
  p = p * x + 3.3333317e-1f;
  const Vec square = x * x;
  const Vec tail = square * x * p - 0.5f * square - exponent * 2.12194440e-4f;
  return exponent * 0.693359375f + (x + tail);  // ln 2 in two parts, the first exact in a product with an exponent
}

// Box and Muller on two words: r cos a and r sin a with r = sqrt(-2 ln u(radius)), a = 2 pi u(turn).
inline void normal_pair(VecBits radius, VecBits turn, Vec& first, Vec& second) {
  const Vec r = sqrt(-2.0f * log(uniform(radius)));
  // a = pi/2 (quarter + f) with f in [-1/2, 1/2], all exact
  const auto n = as<VecInts>(2 * (turn >> 9) + 1);
  const VecInts quarter = (n + (1 << 21)) >> 22;
  const Vec f = convert<Vec>(n - (quarter << 22)) * 0x1p-22f;
  const Vec z = f * f;
  Vec sine = splat(-4.6016579e-3f), cosine = splat(9.0402167e-4f);  // least maximum error, degrees 7 and 8
  sine = sine * z + 7.9680033e-2f;
  sine = sine * z - 6.4596346e-1f;
  sine = f * (sine * z + 1.57079632f);
  cosine = cosine * z - 2.0860289e-2f;
  cosine = cosine * z + 2.5366924e-1f;
  cosine = cosine * z - 1.2337005f;
  cosine = cosine * z + 1.0f;
  const VecInts swapped = (quarter & 1) != 0;
  const VecInts flip_first = ((quarter + 1) & 2) << 30, flip_second = (quarter & 2) << 30;
  const auto sine_bits = as<VecInts>(sine), cosine_bits = as<VecInts>(cosine);
  first = r * as<Vec>(((swapped & sine_bits) | (~swapped & cosine_bits)) ^ flip_first);
  second = r * as<Vec>(((swapped & cosine_bits) | (~swapped & sine_bits)) ^ flip_second);
}

// Four vectors read across: to[4 i + j] = from[j][i].
inline void interleave(const Vec (&from)[4], float* to) {
#if defined(__AVX512F__)
  const auto unpack_low = [](Vec x, Vec y) { return _mm512_unpacklo_ps((__m512)x, (__m512)y); };
  const auto unpack_high = [](Vec x, Vec y) { return _mm512_unpackhi_ps((__m512)x, (__m512)y); };
  const auto pairs = [](__m512 x, __m512 y, bool high) {
    const auto a = _mm512_castps_pd(x), b = _mm512_castps_pd(y);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
  };
  const __m512 low_a = unpack_low(from[0], from[1]), low_b = unpack_low(from[2], from[3]);
  const __m512 high_a = unpack_high(from[0], from[1]), high_b = unpack_high(from[2], from[3]);
  // in each quarter of 128 bits one whole group of four; group 4 q + k stands in quarter q of part k
  const __m512 part[4] = {pairs(low_a, low_b, false), pairs(low_a, low_b, true), pairs(high_a, high_b, false),
                          pairs(high_a, high_b, true)};
  const __m512 a = _mm512_shuffle_f32x4(part[0], part[1], 0x44), b = _mm512_shuffle_f32x4(part[2], part[3], 0x44);
  const __m512 c = _mm512_shuffle_f32x4(part[0], part[1], 0xEE), d = _mm512_shuffle_f32x4(part[2], part[3], 0xEE);
  _mm512_storeu_ps(to, _mm512_shuffle_f32x4(a, b, 0x88));
  _mm512_storeu_ps(to + 16, _mm512_shuffle_f32x4(a, b, 0xDD));
  _mm512_storeu_ps(to + 32, _mm512_shuffle_f32x4(c, d, 0x88));
  _mm512_storeu_ps(to + 48, _mm512_shuffle_f32x4(c, d, 0xDD));
#else
  float values[4][kLanes];
  for (int j = 0; j < 4; ++j) store(values[j], from[j]);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) to[4 * i + j] = values[j][i];
#endif
}

constexpr int64_t kNormals = 128;  // in one call

// The normals of draws (step, kNoise, quad + 0..31, 0), as they stand in a sample.
inline void normals(const RoundKeys& keys, int64_t step, int64_t quad, float (&to)[kNormals]) {
  Words words[2];
  philox(keys, step, kNoise, quad, words);
  each<2>([&](auto k) UVG_INLINED {
    const VecBits(&w)[4] = words[k].w;
    Vec made[4];
    normal_pair(w[0], w[1], made[0], made[1]);
    normal_pair(w[2], w[3], made[2], made[3]);
    interleave(made, to + k * 4 * kLanes);
  });
}

}  // namespace UVG_ISA
}  // namespace uvg
