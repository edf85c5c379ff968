// Keys and values of a few queries, read as they lie: packing all of them would cost more than the products. A score is
// summed up along the key, sixteen sums side by side, where a packed key's is one sum in the order of the width.
#pragma once

#include "cpu/attention.h"

namespace uvg {
namespace UVG_ISA {

constexpr int64_t kFew = 6;  // queries of a sample at the most

constexpr int64_t kRowsAhead = 12;  // of values that are asked for
constexpr int kAtOnce = 4;          // keys

// out[i] = query . rows[i], kAtOnce of them.
UVG_NOINLINE inline void dots(const float* query, const float* const* rows, int64_t width, float* out) {
  Vec sums[kAtOnce] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec values = load(query + d);
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) sums[i] = multiply_add(values, load(rows[i] + d), sums[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kAtOnce; ++i) out[i] = sum(sums[i]);
}

// V vectors of columns of R results (+)= probabilities, kRow apart, times `count` rows of values.
template <int R, int V, int64_t kRow>
UVG_NOINLINE void weigh(float* out, int64_t out_row, const float* probabilities, const float* const* rows,
                        int64_t column, int64_t count, bool first) {
  Vec sum[R][V] = {};
  for (int64_t k = 0; k < count; ++k) {
    Vec values[V];
    const float* later = rows[k + kRowsAhead < count ? k + kRowsAhead : k];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) __builtin_prefetch(later + column + j * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) values[j] = load(rows[k] + column + j * kLanes);
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
      const Vec share = splat(probabilities[r * kRow + k]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[r][j] = multiply_add(share, values[j], sum[r][j]);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      float* to = out + r * out_row + column + j * kLanes;
      store(to, first ? sum[r][j] : load(to) + sum[r][j]);
    }
}

// body(first row, Vecs<rows>, Vecs<vectors at once>): as many sums as registers hold.
template <typename Body>
UVG_INLINE void by_few(int64_t rows, Body&& body) {
  int64_t r = 0;
  for (; r + 4 < rows || r + 3 == rows; r += 3) body(r, Vecs<3>{}, Vecs<2>{});
  for (; r + 2 <= rows; r += 2) body(r, Vecs<2>{}, Vecs<2>{});
  if (r < rows) body(r, Vecs<1>{}, Vecs<4>{});
}

// As PackedKeys, for fp32 rows of whole vectors.
template <typename S>
struct LyingKeys {
  using F = typename S::Format;
  static constexpr int64_t kRows = 1, kRow = Workspace<S>::row_of_probabilities();
  const Rows<float> keys, values;
  const int64_t width;
  uint32_t* const none;  // work_words: a row of zeros where there is no key

  LyingKeys(const Rows<float>& k, const Rows<float>& v, int64_t row_width, uint32_t* room)
      : keys(k), values(v), width(row_width), none(room) {
    std::memset(none, 0, static_cast<size_t>(width) * sizeof *none);
  }

  static int64_t work_words(int64_t width) { return round_up(width, kLanes); }

  template <What kWhat>
  void scores(const Workspace<S>& w, int64_t queries, int64_t k, int64_t here, float factor) const {
    for (int64_t c = 0; c < here; c += kLanes) {
      const int64_t left = here - c;
      const float* rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) rows[i] = row_of(keys, k + c + i, i < left);
      ahead(k + c + kLanes);
      for (int64_t r = 0; r < queries; ++r) {
        const auto* query = reinterpret_cast<const float*>(w.queries + r * width);
        float products[kLanes];
        for (int64_t i = 0; i < kLanes; i += kAtOnce) dots(query, rows + i, width, products + i);
        Vec x[1] = {load(products)};
        const auto put = left < kLanes ? put_scores<S, 1, true, kWhat> : put_scores<S, 1, false, kWhat>;
        put(x, 1.0f, factor, left, w.probabilities + r * kRow, c, w.rows, r);
      }
    }
  }

  void multiply(const Workspace<S>& w, int64_t queries, int64_t k, int64_t here) const {
    const float* rows[kKeys<F>];
    const int64_t count = round_up(here, kLanes);
    for (int64_t i = 0; i < count; ++i) rows[i] = row_of(values, k + i, i < here);
    by_few(queries, [&](int64_t r, auto together, auto at_once) {
      constexpr int R = decltype(together)::value, V = decltype(at_once)::value;
      const auto* shares = reinterpret_cast<const float*>(w.probabilities + r * kRow);
      int64_t c = 0;
      for (; c + V * kLanes <= width; c += V * kLanes)
        weigh<R, V, kRow>(w.out + r * width, width, shares, rows, c, count, k == 0);
      for (; c < width; c += kLanes) weigh<R, 1, kRow>(w.out + r * width, width, shares, rows, c, count, k == 0);
    });
  }

 private:
  const float* row_of(const Rows<float>& rows, int64_t i, bool real) const {
    return real ? rows.at(i) : reinterpret_cast<const float*>(none);
  }

  // The next keys, for they lie apart.
  void ahead(int64_t first) const {
    for (int64_t i = first; i < first + kLanes && i < keys.count; ++i) keys.prefetch(i, width);
  }
};

}  // namespace UVG_ISA
}  // namespace uvg
