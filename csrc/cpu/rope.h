// Rotary positions of one row: which pairs turn by which angles.
#pragma once

#include "common/row_lists.h"
#include "cpu/vec.h"
#include "uvg/qk_norm_rope.h"

namespace uvg {
namespace UVG_ISA {

enum RopeKind { kVideo = 0, kText = 1, kNone = 2 };

constexpr float kSigns[kLanes] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};

#if !defined(__AVX512F__)
template <typename V>
UVG_INLINE V swapped(V v) {
  if constexpr (kIsTwo<V>) {
    return {swapped(v.low), swapped(v.high)};
  } else {
    V out;
    for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i) out[i] = v[i ^ 1];
    return out;
  }
}

template <bool odd, typename V>
UVG_INLINE V doubled(V v) {
  if constexpr (kIsTwo<V>) {
    return {doubled<odd>(v.low), doubled<odd>(v.high)};
  } else {
    V out;
    for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i) out[i] = v[odd ? i | 1 : i & ~size_t{1}];
    return out;
  }
}
#endif

// Every second lane changes places with its neighbour.
inline Vec swap_neighbours(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_permute_ps(0xFFFF, (__m512)v, 0xB1);  // unmasked, g++ 12 warns of its own header
#else
  return swapped(v);
#endif
}

// Lanes 2 i and 2 i + 1 both get lane 2 i, or lane 2 i + 1 where `odd`.
template <bool odd>
inline Vec twice(Vec v) {
#if defined(__AVX512F__)
  return (Vec)(odd ? _mm512_maskz_movehdup_ps(0xFFFF, (__m512)v) : _mm512_maskz_moveldup_ps(0xFFFF, (__m512)v));
#else
  return doubled<odd>(v);
#endif
}

class Rope {
 public:
  Rope(Scratch& scratch, const QkNormRopeParams& p)
      : p_(p),
        head_(p.width / p.heads),
        pairs_(head_ / 2),
        turns_(scratch.floats(head_ + kLanes)),
        cos_(scratch.floats(head_ + kLanes)),
        sin_(scratch.floats(head_ + kLanes)) {}

  // The row at `offset` inside span `span` (-1: not rotated). backward: turn the other way.
  void seek(int64_t span, int64_t offset, bool backward) {
    kind_ = kNone;
    if (span < 0) return;
    const int32_t* s = p_.spans + span * 6;
    kind_ = s[2] == kVideo ? kVideo : kText;
    const float turn = backward ? -1.0f : 1.0f;
    if (kind_ == kText) {
      gather(0, pairs_, offset);
      return split(turn);
    }
    const int64_t height = s[4], width = s[5], side = head_ / 6;
    gather(0, pairs_ - 2 * side, offset / (height * width));
    gather(pairs_ - 2 * side, pairs_ - side, offset / width % height);
    gather(pairs_ - side, pairs_, offset % width);
    spread(turn);
  }

  // put(column, value, columns) gets R x of a row whose values are x(column, columns).
  template <typename Value, typename Put>
  UVG_INLINE void apply(Value&& x, Put&& put) const {
    const bool whole = kind_ == kVideo ? head_ % kLanes == 0 : pairs_ % kLanes == 0;
    if (kind_ == kNone) return columns(p_.width, [&](int64_t i, int64_t n) UVG_INLINED { put(i, x(i, n), n); });
    if (!whole) return apply_alone(x, put);
    const float *c = cos_, *s = sin_;
    for (int64_t first = 0; first < p_.width; first += head_) {
      if (kind_ == kVideo) {
        for (int64_t i = 0; i < head_; i += kLanes) {
          const Vec v = x(first + i, kLanes);
          put(first + i, v * load(c + i) + swap_neighbours(v) * load(s + i), kLanes);
        }
        continue;
      }
      for (int64_t i = 0; i < pairs_; i += kLanes) {
        const Vec a = x(first + i, kLanes), b = x(first + pairs_ + i, kLanes);
        put(first + i, a * load(c + i) + b * load(s + i), kLanes);
        put(first + pairs_ + i, b * load(c + pairs_ + i) + a * load(s + pairs_ + i), kLanes);
      }
    }
  }

 private:
  // Cosine and sine of pairs [first, last), as in the table.
  void gather(int64_t first, int64_t last, int64_t position) {
    const float* from = p_.table + (kind_ * p_.positions + position) * head_ + 2 * first;
    columns(2 * (last - first), [&](int64_t i, int64_t n) { store(turns_ + 2 * first + i, load(from + i, n), n); });
  }

  // Cosines and signed sines, each beside the value that it multiplies: pairs of neighbours, and of the two halves.
  void spread(float turn) {
    const Vec sign = turn * load(kSigns);
    columns(head_, [&](int64_t i, int64_t n) {
      const Vec v = load(turns_ + i, n);
      store(cos_ + i, twice<false>(v), n), store(sin_ + i, sign * twice<true>(v), n);
    });
  }

  void split(float turn) {
    for (int64_t j = 0; j < pairs_; ++j) {
      cos_[j] = cos_[pairs_ + j] = turns_[2 * j];
      sin_[pairs_ + j] = turn * turns_[2 * j + 1];
      sin_[j] = -sin_[pairs_ + j];
    }
  }

  // Heads that are no whole number of vectors: value by value.
  template <typename Value, typename Put>
  UVG_INLINE void apply_alone(Value& x, Put& put) const {
    const int64_t other = kind_ == kVideo ? 1 : pairs_, step = kind_ == kVideo ? 2 : 1;
    for (int64_t first = 0; first < p_.width; first += head_) {
      for (int64_t j = 0; j < pairs_; ++j) {
        const int64_t a = step * j, b = a + other;
        const float va = x(first + a, 1)[0], vb = x(first + b, 1)[0];
        put(first + a, splat(va * cos_[a] + vb * sin_[a]), 1);
        put(first + b, splat(vb * cos_[b] + va * sin_[b]), 1);
      }
    }
  }

  const QkNormRopeParams& p_;
  int64_t head_, pairs_;
  float *turns_, *cos_, *sin_;  // [head]
  int kind_ = kNone;
};

}  // namespace UVG_ISA
}  // namespace uvg
