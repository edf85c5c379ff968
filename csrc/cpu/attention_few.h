// Keys and values of a few queries, read as they lie: packing all of them would cost more than the products. A row has
// the bits that it has with packed ones: each of its sums runs in the same order.
#pragma once

#include "cpu/attention.h"

namespace uvg {
namespace UVG_ISA {

constexpr int64_t kFew = 6;  // queries of a sample at the most

constexpr int64_t kRowsAhead = 12;  // of values that are asked for
constexpr int kAtOnce = 4;          // vectors of keys, or of columns

// Goes on with the products of R queries and V vectors of keys over kLanes values of the depth. x: kAtOnce vectors of
// each query; row: values of a query.
template <typename F, int R, int V>
UVG_NOINLINE void go_on(Vec* x, const uint32_t* queries, int64_t row, const uint32_t* panel, int64_t panel_row) {
  Vec sum[R][V];
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sum[r][j] = x[r * kAtOnce + j];
  multiply<F>(sum, queries, row, 1, panel, panel_row, kLanes);
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) x[r * kAtOnce + j] = sum[r][j];
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
  uint32_t* const work;  // work_words

  LyingKeys(const Rows<float>& k, const Rows<float>& v, int64_t row_width, uint32_t* room)
      : keys(k), values(v), width(row_width), work(room) {
    std::memset(work + kLanes * kAtOnce * kLanes, 0, static_cast<size_t>(width) * sizeof *work);
  }

  static int64_t work_words(int64_t width) { return kLanes * kAtOnce * kLanes + round_up(width, kLanes); }

  template <What kWhat>
  void scores(const Workspace<S>& w, int64_t queries, int64_t k, int64_t here, float factor) const {
    int64_t c = 0;
    for (; c + kAtOnce * kLanes <= here; c += kAtOnce * kLanes)
      tile<kAtOnce, kWhat>(w, queries, k, c, here - c, factor);
    for (; c < here; c += kLanes) tile<1, kWhat>(w, queries, k, c, here - c, factor);
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
  // A row of zeros where there is none: such keys are computed as they are among packed ones.
  const float* row_of(const Rows<float>& rows, int64_t i, bool real) const {
    return real ? rows.at(i) : reinterpret_cast<const float*>(work) + kLanes * kAtOnce * kLanes;
  }

  void ahead(int64_t first, int64_t count, int64_t d) const {
    for (int64_t i = first; i < first + count && i < keys.count; ++i) __builtin_prefetch(keys.at(i) + d, 0, 2);
  }

  template <int V, What kWhat>
  UVG_NOINLINE void tile(const Workspace<S>& w, int64_t queries, int64_t k, int64_t c, int64_t left,
                         float factor) const {
    const uint32_t* rows[V * kLanes];
    Vec x[kFew][kAtOnce] = {};
    for (int64_t i = 0; i < V * kLanes; ++i)
      rows[i] = reinterpret_cast<const uint32_t*>(row_of(keys, k + c + i, i < left));
    for (int64_t d = 0; d < width; d += kLanes) {
      for (int j = 0; j < V; ++j) transpose16(rows + j * kLanes, d, work + j * kLanes, V * kLanes);
      by_few(queries, [&](int64_t r, auto together, auto at_once) {
        constexpr int R = decltype(together)::value, kMost = decltype(at_once)::value, kPart = V < kMost ? V : kMost;
        for (int j = 0; j < V; j += kPart)
          go_on<F, R, kPart>(x[r] + j, w.queries + r * width + d, width, work + j * kLanes, V * kLanes);
      });
      ahead(k + c + V * kLanes, V * kLanes, d);
    }
    for (int64_t r = 0; r < queries; ++r)
      for (int j = 0; j < V; ++j) {
        Vec one[1] = {x[r][j]};
        uint32_t* probabilities = w.probabilities + r * kRow;
        const int64_t column = c + j * kLanes;
        if (V > 1 || left >= kLanes)
          put_scores<S, 1, false, kWhat>(one, 1.0f, factor, left, probabilities, column, w.rows, r);
        else
          put_scores<S, 1, true, kWhat>(one, 1.0f, factor, left, probabilities, column, w.rows, r);
      }
  }
};

}  // namespace UVG_ISA
}  // namespace uvg
