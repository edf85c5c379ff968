// AVX-512 intrinsics that csrc/cpu uses, as loops over lanes, for a machine whose CPU has none (`make emulate`).
// Put in front of each file by -include; UVG_EMULATE_BF16 for those of AVX512_BF16 and VNNI too.
#pragma once

#include <immintrin.h>  // the compiler's own: this folder is in no search path

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AVX512F__ 1
#if defined(UVG_EMULATE_BF16)
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif

namespace emulated {

template <typename T, typename V>
using Lanes = std::array<T, sizeof(V) / sizeof(T)>;

template <typename T, typename V>
Lanes<T, V> lanes(const V& v) {
  Lanes<T, V> out;
  std::memcpy(&out, &v, sizeof v);
  return out;
}

template <typename V, typename L>
V vector(const L& from) {
  static_assert(sizeof(V) == sizeof(L));
  V out;
  std::memcpy(&out, &from, sizeof out);
  return out;
}

// Each lane by itself: of one vector, of two.
template <typename T, typename V, typename F>
V each(const V& a, F&& f) {
  auto x = lanes<T>(a);
  for (T& value : x) value = f(value);
  return vector<V>(x);
}

template <typename T, typename V, typename F>
V each(const V& a, const V& b, F&& f) {
  auto x = lanes<T>(a);
  const auto y = lanes<T>(b);
  for (size_t i = 0; i < x.size(); ++i) x[i] = f(x[i], y[i]);
  return vector<V>(x);
}

// Lane i of the result is lane from(i) of a, or of b where that is past a's end.
template <typename T, typename V, typename F>
V moved(const V& a, const V& b, F&& from) {
  const auto x = lanes<T>(a), y = lanes<T>(b);
  auto out = x;
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t place = from(i);
    out[i] = place < x.size() ? x[place] : y[place - x.size()];
  }
  return vector<V>(out);
}

inline bool named(unsigned mask, size_t lane) { return mask >> lane & 1u; }

inline float of_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// fp16, by the instructions for half as many
inline __m512 of_fp16(__m256i a) {
  const auto x = lanes<__m128i>(a);
  return vector<__m512>(std::array<__m256, 2>{_mm256_cvtph_ps(x[0]), _mm256_cvtph_ps(x[1])});
}

inline __m512 of_fp16_named(__m512 otherwise, unsigned mask, __m256i a) {
  auto x = lanes<float>(otherwise);
  const auto y = lanes<float>(of_fp16(a));
  for (size_t i = 0; i < x.size(); ++i)
    if (named(mask, i)) x[i] = y[i];
  return vector<__m512>(x);
}

inline __m256i to_fp16(__m512 a) {
  const auto x = lanes<__m256>(a);
  return vector<__m256i>(std::array<__m128i, 2>{_mm256_cvtps_ph(x[0], 0), _mm256_cvtps_ph(x[1], 0)});
}

// Memory
inline __m512i load(const void* p) {
  __m512i v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename V>
void stream(void* p, V v) {  // which ends the program off its lines, as the CPU would
  if (reinterpret_cast<uintptr_t>(p) % sizeof v != 0) std::abort();
  store(p, v);
}

template <typename T, typename V>
V load_named(V otherwise, unsigned mask, const void* p) {
  auto x = lanes<T>(otherwise);
  for (size_t i = 0; i < x.size(); ++i)
    if (named(mask, i)) std::memcpy(&x[i], static_cast<const T*>(p) + i, sizeof(T));
  return vector<V>(x);
}

template <typename T, typename V>
void store_named(void* p, unsigned mask, V v) {
  const auto x = lanes<T>(v);
  for (size_t i = 0; i < x.size(); ++i)
    if (named(mask, i)) std::memcpy(static_cast<T*>(p) + i, &x[i], sizeof(T));
}

// Lanes that change places, within quarters of 128 bits or by whole quarters
template <typename T, int kHigh>
__m512i unpack(__m512i a, __m512i b) {
  constexpr size_t quarter = 16 / sizeof(T), all = 64 / sizeof(T);
  return moved<T>(
      a, b, [](size_t i) { return i / quarter * quarter + i % quarter / 2 + kHigh * quarter / 2 + (i % 2 ? all : 0); });
}

inline __m512i shuffle_quarters(__m512i a, __m512i b, int order) {
  return moved<int32_t>(a, b, [=](size_t i) {
    const size_t quarter = static_cast<size_t>(order >> 2 * (i / 4) & 3);
    return 4 * quarter + i % 4 + (i < 8 ? 0 : 16);
  });
}

inline __m512i shuffle_words(__m512i a, int order) {
  return moved<int32_t>(a, a, [=](size_t i) { return i / 4 * 4 + static_cast<size_t>(order >> 2 * (i % 4) & 3); });
}

inline __m512i shuffle_words_named(__m512i otherwise, unsigned mask, __m512i a, int order) {
  const __m512i shuffled = shuffle_words(a, order);
  return load_named<int32_t>(otherwise, mask, &shuffled);
}

// Words of 16 bits, each from where `places` say: of two vectors, of one where the mask names the lane.
inline __m512i place_words(__m512i a, __m512i places, __m512i b) {
  const auto from = lanes<uint16_t>(places);
  return moved<uint16_t>(a, b, [&](size_t i) { return static_cast<size_t>(from[i] & 63); });
}

inline __m512i place_words_named(unsigned mask, __m512i places, __m512i a) {
  const __m512i placed = place_words(a, each<uint16_t>(places, [](uint16_t x) { return x & 31; }), a);
  return load_named<uint16_t>(__m512i{}, mask, &placed);
}

// The lower half of the result; what stands above it on a real CPU is nobody's business, so here it is never zero.
inline __m512i with_upper_half(__m256i low) {
  return vector<__m512i>(std::array<__m256i, 2>{low, _mm256_set1_epi8(0x5A)});
}

inline __m256 half(__m512 v, int which) {
  __m256 out;
  std::memcpy(&out, reinterpret_cast<const char*>(&v) + 32 * which, sizeof out);
  return out;
}

// Numbers
inline float scaled(float value, float by) {
  const float exponent = std::floor(by);
  if (std::isnan(exponent)) return exponent;
  if (std::isinf(exponent)) return exponent < 0 ? 0.0f : INFINITY * value;
  return std::ldexp(value, static_cast<int>(std::clamp(exponent, -1000.0f, 1000.0f)));
}

inline __m512i widened(unsigned mask, __m256i a) {
  const auto x = lanes<uint16_t>(a);
  Lanes<uint32_t, __m512i> out{};
  for (size_t i = 0; i < out.size(); ++i) out[i] = named(mask, i) ? x[i] : 0;
  return vector<__m512i>(out);
}

inline __m512i shifted_named(__m512i otherwise, unsigned mask, __m512i a, unsigned by) {
  const __m512i moved_up = each<uint32_t>(a, [=](uint32_t x) { return x << by; });
  return load_named<uint32_t>(otherwise, mask, &moved_up);
}

inline __m512i rounded(__m512 a) {
  const auto x = lanes<float>(a);
  Lanes<int32_t, __m512i> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<int32_t>(std::nearbyint(x[i]));
  return vector<__m512i>(out);
}

inline __m128i to_bytes(__m512i a) {
  const auto x = lanes<int32_t>(a);
  Lanes<int8_t, __m128i> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<int8_t>(x[i]);
  return vector<__m128i>(out);
}

// Sums of neighbours' products: unsigned by signed bytes, four to a lane.
inline __m512i dot_bytes(__m512i sum, __m512i a, __m512i b) {
  auto out = lanes<int32_t>(sum);
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  for (size_t i = 0; i < x.size(); ++i) out[i / 4] += static_cast<int>(x[i]) * static_cast<int>(y[i]);
  return vector<__m512i>(out);
}

#if defined(UVG_EMULATE_BF16)
inline __m256bh narrowed(__m512 a) {
  const auto x = lanes<float>(a);
  Lanes<uint16_t, __m256bh> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = to_bf16(x[i]);
  return vector<__m256bh>(out);
}

inline __m512bh narrowed(__m512 high, __m512 low) {
  const auto x = lanes<float>(high), y = lanes<float>(low);
  Lanes<uint16_t, __m512bh> out;
  for (size_t i = 0; i < 16; ++i) out[i] = to_bf16(y[i]), out[16 + i] = to_bf16(x[i]);
  return vector<__m512bh>(out);
}

inline __m512 dot_pairs(__m512 sum, __m512bh a, __m512bh b) {
  auto out = lanes<float>(sum);
  const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  for (size_t i = 0; i < out.size(); ++i)
    for (size_t j : {2 * i + 1, 2 * i}) out[i] = std::fma(of_bf16(x[j]), of_bf16(y[j]), out[i]);
  return vector<__m512>(out);
}
#endif

template <typename F>
float over(__m512 a, F&& f) {
  const auto x = lanes<float>(a);
  float result = x[0];
  for (float value : x) result = f(result, value);
  return result;
}

}  // namespace emulated

#define _mm512_loadu_si512 emulated::load
#define _mm512_storeu_si512 emulated::store
#define _mm512_storeu_ps emulated::store
#define _mm512_stream_ps emulated::stream
#define _mm512_mask_loadu_ps emulated::load_named<float>
#define _mm512_mask_storeu_ps emulated::store_named<float>
#define _mm256_maskz_loadu_epi16(mask, p) emulated::load_named<uint16_t>(__m256i{}, mask, p)
#define _mm256_mask_storeu_epi16 emulated::store_named<uint16_t>
#define _mm512_set1_epi32(value) emulated::each<int32_t>(__m512i{}, [&](int32_t) { return value; })
#define _mm512_set1_epi64(value) emulated::each<int64_t>(__m512i{}, [&](int64_t) { return value; })
#define _mm512_unpacklo_epi32 emulated::unpack<int32_t, 0>
#define _mm512_unpackhi_epi32 emulated::unpack<int32_t, 1>
#define _mm512_unpacklo_epi64 emulated::unpack<int64_t, 0>
#define _mm512_unpackhi_epi64 emulated::unpack<int64_t, 1>
#define _mm512_unpacklo_ps(a, b) ((__m512)emulated::unpack<int32_t, 0>((__m512i)(a), (__m512i)(b)))
#define _mm512_unpackhi_ps(a, b) ((__m512)emulated::unpack<int32_t, 1>((__m512i)(a), (__m512i)(b)))
#define _mm512_unpacklo_pd(a, b) ((__m512d)emulated::unpack<int64_t, 0>((__m512i)(a), (__m512i)(b)))
#define _mm512_unpackhi_pd(a, b) ((__m512d)emulated::unpack<int64_t, 1>((__m512i)(a), (__m512i)(b)))
#define _mm512_castps_pd(a) ((__m512d)(a))
#define _mm512_castpd_ps(a) ((__m512)(a))
#define _mm512_shuffle_i32x4 emulated::shuffle_quarters
#define _mm512_shuffle_f32x4(a, b, order) ((__m512)emulated::shuffle_quarters((__m512i)(a), (__m512i)(b), order))
#define _mm512_mask_shuffle_epi32(v, mask, a, order) emulated::shuffle_words_named(v, mask, a, (int)(order))
#define _mm512_maskz_permute_ps(mask, a, order) ((__m512)emulated::shuffle_words((__m512i)(a), order))
#define _mm512_maskz_moveldup_ps(mask, a) ((__m512)emulated::shuffle_words((__m512i)(a), 0xA0))
#define _mm512_maskz_movehdup_ps(mask, a) ((__m512)emulated::shuffle_words((__m512i)(a), 0xF5))
#define _mm512_permutex2var_epi16 emulated::place_words
#define _mm512_maskz_permutexvar_epi16 emulated::place_words_named
#define _mm512_castsi256_si512 emulated::with_upper_half
#define _mm512_maskz_extracti64x4_epi64(mask, a, which) ((__m256i)emulated::half((__m512)(a), which))
#define _mm512_maskz_extractf32x8_ps(mask, a, which) emulated::half(a, which)
#define _mm512_maskz_cvtepu16_epi32 emulated::widened
#define _mm512_maskz_cvtph_ps(mask, a) emulated::of_fp16(a)
#define _mm512_mask_cvtph_ps(otherwise, mask, a) emulated::of_fp16_named(otherwise, mask, a)
#define _mm512_maskz_cvtps_ph(mask, a, how) emulated::to_fp16(a)
#define _mm512_mask_slli_epi32 emulated::shifted_named
#define _mm512_srli_epi64(a, by) emulated::each<uint64_t>(a, [&](uint64_t x) { return x >> (by); })
#define _mm512_mul_epu32(a, b) \
  emulated::each<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return (x & 0xFFFFFFFF) * (y & 0xFFFFFFFF); })
#define _mm512_sqrt_ps(a) emulated::each<float>(a, [](float x) { return std::sqrt(x); })
#define _mm512_scalef_ps(a, by) emulated::each<float>(a, by, emulated::scaled)
#define _mm512_reduce_ps(a, how) \
  emulated::each<float>(a, [](float x) { return std::isinf(x) ? 0.0f : x - std::floor(x); })
#define _mm512_reduce_min_ps(a) emulated::over(a, [](float x, float y) { return std::min(x, y); })
#define _mm512_reduce_max_ps(a) emulated::over(a, [](float x, float y) { return std::max(x, y); })
#define _mm512_maskz_cvtps_epi32(mask, a) emulated::rounded(a)
#define _mm512_maskz_cvtepi32_epi8(mask, a) emulated::to_bytes(a)
#define _mm512_dpbusd_epi32 emulated::dot_bytes
#define _mm512_dpbf16_ps emulated::dot_pairs
#define _mm512_cvtne2ps_pbh(high, low) emulated::narrowed(high, low)
#define _mm512_cvtneps_pbh(a) emulated::narrowed(a)
