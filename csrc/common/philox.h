// Philox4x32-10: the counter-based generator behind every random draw (source: Salmon et al., SC11).
// The same words as uvg_engine/reference/philox.py; counter = (step, stream, token, tile), key = seed words.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define UVG_PHILOX __host__ __device__ __forceinline__
#else
#define UVG_PHILOX static inline  // each instruction set its own copy
#endif

namespace uvg {

// Second counter word, one value per use, so that no two uses share a draw.
enum PhiloxStream : uint32_t { kNoise = 0, kSource = 1, kCoin = 2, kDraw = 3, kData = 4, kTime = 5 };

struct PhiloxCounter {
  uint32_t step, stream, token, tile;
};

struct PhiloxKey {
  uint32_t lo, hi;
};

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

UVG_PHILOX PhiloxKey philox_key(int64_t seed) {
  const auto bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

UVG_PHILOX PhiloxWords philox4x32(PhiloxCounter counter, PhiloxKey key) {
  PhiloxWords c = {counter.step, counter.stream, counter.token, counter.tile};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c.w0;
    const uint64_t b = uint64_t{0xCD9E8D57} * c.w2;
    c = {static_cast<uint32_t>(b >> 32) ^ c.w1 ^ key.lo, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c.w3 ^ key.hi, static_cast<uint32_t>(a)};
    key = {key.lo + 0x9E3779B9u, key.hi + 0xBB67AE85u};
  }
  return c;
}

// A word as a uniform in (0, 1): odd multiples of 2^-24, exact in fp32, never 0 or 1.
UVG_PHILOX float philox_uniform(uint32_t word) {
  return static_cast<float>(2 * (word >> 9) + 1) * (1.0f / 16777216.0f);
}

// A word as an integer in [0, high), high < 2^31; bias below high * 2^-32.
UVG_PHILOX uint32_t philox_integer(uint32_t word, uint32_t high) {
  return static_cast<uint32_t>((static_cast<uint64_t>(word) * high) >> 32);
}

}  // namespace uvg
