// Softmax attention forward, for kernels that differ in how they come to the scores (S).
//
// S has: Format, in which probabilities meet the values; query_words, panel_words, work_words: of a packed query, of
// kPanel packed keys and of room to pack them in, all of rows of `width` values; pack_queries, pack_keys; multiply, a
// tile of products; scale_of, what a query's products are multiplied with to be scores; kScaled, whether that is not 1;
// kLies, whether keys may be read as they lie.
//
// The scores of a tile never reach memory: scaled, exponentiated and rounded in registers, they are stored as the left
// operand of the product with the values. The exponent's reference is 0 until a score asks for another one, so that
// ordinary rows never rescale (figures: AGENTS.md). It is a score as it comes out of the product: the difference of two
// loses nothing, however large they are.
#pragma once

#include "cpu/per_thread.h"
#include "cpu/tile.h"
#include "uvg/flash_attention.h"

namespace uvg {
namespace UVG_ISA {

using Params = FlashAttentionParams;

#if defined(__AVX512F__)
constexpr int64_t kQueries = 192;  // rows of a block; a multiple of kTileRows
#else
constexpr int64_t kQueries = 96;
#endif
constexpr float kHigh = 2.3538527e17f;  // e^40: where sums leave [1 / kHigh, kHigh], a row takes another reference
constexpr float kNever = -__builtin_inff();

template <typename F>
constexpr int64_t kKeys = F::kPer == 2 ? 512 : 256;  // keys of a block

// Softmax of the rows of a block so far. x = (score - reference) * scale in the format's unit.
struct RowState {
  Vec* top;       // largest score of a block of keys, or largest negated one where scale < 0, where one is asked for
  Vec* total;     // sum of e^x in fp32
  Vec* rounded;   // sum of e^x as the product reads it; total itself, and block[1] block[0], where F::kKept
  Vec* block[2];  // total and rounded of this block of keys alone
  float* reference;
};

// Keys and values of one sample and head, packed. A slot of several: each has room for the longest sample.
template <typename S>
struct Packed {
  using F = typename S::Format;
  uint32_t *keys, *values;
  int64_t key_words, value_words;

  Packed(Scratch& scratch, const Params& p, int64_t slots) {
    const int64_t most = round_up(p.keys->longest(), kPanel);
    key_words = most / kPanel * S::panel_words(p.width), value_words = most / F::kPer * round_up(p.width, kLanes);
    keys = scratch.words(slots * key_words), values = scratch.words(slots * value_words);
  }

  Packed slot(int64_t i) const {
    Packed one = *this;
    one.keys += i * key_words, one.values += i * value_words;
    return one;
  }
};

template <typename T>
Rows<T> rows_of(const Params& p, const void* x, int64_t head, const RowLists& lists, int64_t s) {
  return {static_cast<const T*>(x) + head * p.width, p.heads * p.width, lists.rows(s), lists.size(s)};
}

template <typename S>
void pack_keys(const Params& p, int64_t s, int64_t head, const Packed<S>& to, uint32_t* work) {
  S::pack_keys(rows_of<typename S::Format::Value>(p, p.k, head, *p.keys, s), p.width, to.keys, work);
}

template <typename S>
void pack_values(const Params& p, int64_t s, int64_t head, const Packed<S>& to, uint32_t*) {
  using F = typename S::Format;
  const int64_t padded = round_up(p.keys->size(s), kPanel);
  pack_columns<F>(rows_of<typename F::Value>(p, p.v, head, *p.keys, s), p.width, padded, to.values);
}

// For up to `most` queries at once, kTileRows or a multiple of it.
template <typename S>
struct Workspace {
  using F = typename S::Format;
  uint32_t *queries, *probabilities, *work;
  float* out;
  RowState rows;
  Packed<S> packed;  // `slots` of keys and values

  Workspace(Scratch& scratch, const Params& p, int64_t slots, int64_t most) : packed(scratch, p, slots) {
    queries = scratch.words(most * S::query_words(p.width));
    probabilities = scratch.words(most * row_of_probabilities());
    work = scratch.words(S::work_words(p.width));
    out = scratch.floats(most * round_up(p.width, kLanes));
    for (Vec** sums : {&rows.top, &rows.total, &rows.rounded, &rows.block[0], &rows.block[1]})
      *sums = reinterpret_cast<Vec*>(scratch.floats(most * kLanes));
    if (F::kKept) rows.rounded = rows.total, rows.block[1] = rows.block[0];
    rows.reference = scratch.floats(most);
  }

  static constexpr int64_t row_of_probabilities() {
    return kKeys<F> / F::kPer + kLanes;
  }  // rows off one another's sets
};

enum What { kPlain, kShifted, kPeak };

// Products of a query with V vectors of keys to probabilities and their sums, kPlain where all references are 0; or,
// with kPeak, to the largest score of the row. Those from `valid` on count nothing. by: S::scale_of the query.
template <typename S, int V, bool kTail, What kWhat>
UVG_INLINE void put_scores(Vec (&x)[V], float by, float scale, int64_t valid, uint32_t* probabilities, int64_t column,
                           const RowState& rows, int64_t row) {
  using F = typename S::Format;
  const Vec reference = splat(rows.reference[row]);
  const bool moved = kWhat == kShifted && (!S::kScaled || rows.reference[row] != 0.0f);  // bits are the row's own
  const float whole = by * scale;
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    x[j] = moved ? (x[j] * by - reference) * scale : x[j] * whole;
    if (kTail) x[j] = select(first_lanes(valid - j * kLanes), x[j], splat(kNever));
  }
  if (kWhat == kPeak) {
    for (int j = 0; j < V; ++j) rows.top[row] = select(x[j] > rows.top[row], x[j], rows.top[row]);
    return;
  }
  Vec p[V], total = rows.block[0][row];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    p[j] = F::power(x[j]);
    total += p[j];
  }
  rows.block[0][row] = total;
  if (!F::kKept) rows.block[1][row] = F::rounded_sum(rows.block[1][row], p);
  F::put(probabilities, column, p);
}

// One tile of scores: kTileRows queries from `first` on, V vectors of a panel of packed keys.
template <typename S, int V, bool kTail, What kWhat>
UVG_NOINLINE void score(const uint32_t* queries, const uint32_t* panel, int64_t width, float scale, int64_t valid,
                        uint32_t* probabilities, int64_t column, const RowState& rows, int64_t first) {
  Vec x[kTileRows][V];
  S::multiply(x, queries, panel, width);
#pragma GCC unroll 6
  for (int64_t r = 0; r < kTileRows; ++r)
    put_scores<S, V, kTail, kWhat>(x[r], S::scale_of(queries + r * S::query_words(width), width), scale, valid,
                                   probabilities + r * Workspace<S>::row_of_probabilities(), column, rows, first + r);
}

// Whether a row has no key yet that counts.
inline bool fresh(const RowState& rows, int64_t r) { return largest(rows.total[r]) == 0.0f; }

// Whether a block's sum asks for another reference: it is too large, or the first and too small.
inline bool far(const RowState& rows, int64_t r) {
  const float most = largest(rows.block[0][r]);
  return most > kHigh || (most < 1.0f / kHigh && fresh(rows, r));
}

// Rows of far scores take their largest one as reference; rows.top has it, and keeps it for them alone.
template <typename F>
void rebase(const RowState& rows, int64_t count, float scale, float* out, int64_t width) {
  for (int64_t r = 0; r < count; ++r) {
    const bool asks = far(rows, r);
    const float top = largest(rows.top[r]), reference = scale < 0.0f ? -top : top;
    rows.top[r] = splat(asks ? top : 0.0f);
    if (!asks || top == kNever) continue;
    const float shrink = F::power(splat((rows.reference[r] - reference) * scale))[0];
    rows.reference[r] = reference;
    if (fresh(rows, r)) continue;
    rows.total[r] *= shrink;
    if (!F::kKept) rows.rounded[r] *= shrink;
    float* row = out + r * round_up(width, kLanes);
    for (int64_t i = 0; i < width; i += kLanes) store(row + i, load(row + i) * shrink);
  }
}

// Of rows whose scores in a block are all -inf, nothing of the block counts: the exponential may not reach 0.
inline void forget(const RowState& rows, int64_t count, uint32_t* probabilities, int64_t row) {
  for (int64_t r = 0; r < count; ++r) {
    const float total = sum(rows.block[0][r]);
    if (rows.top[r][0] != kNever || total != total) continue;
    rows.block[0][r] = rows.block[1][r] = Vec{};
    std::memset(probabilities + r * row, 0, static_cast<size_t>(row) * sizeof *probabilities);
  }
}

// Keys and values as `attend` meets them, packed: kRows, of which queries are a multiple; the scores of a block of
// keys, `here` of them from k on; the product of its probabilities with the values.
template <typename S>
struct PackedKeys {
  using F = typename S::Format;
  static constexpr int64_t kRows = kTileRows, kRow = Workspace<S>::row_of_probabilities();
  const Packed<S> packed;
  const int64_t width, total;  // total: rows of dwords of the values

  PackedKeys(const Packed<S>& slot, int64_t row_width, int64_t keys)
      : packed(slot), width(row_width), total(round_up(keys, kPanel) / F::kPer) {}

  template <What kWhat>
  void scores(const Workspace<S>& w, int64_t queries, int64_t k, int64_t here, float factor) const {
    for (int64_t c = 0; c < here; c += kPanel) {
      auto* tile = score<S, kTileVecs, false, kWhat>;
      if (here - c < kPanel)
        with_vecs<F>(here - c, [&](auto vecs) { tile = score<S, decltype(vecs)::value, true, kWhat>; });
      const uint32_t* panel = packed.keys + (k + c) / kPanel * S::panel_words(width);
      Ahead next(panel + S::panel_words(width), S::panel_words(width), queries / kTileRows);
      for (int64_t r = 0; r < queries; r += kTileRows) {
        next.ask();
        tile(w.queries + r * S::query_words(width), panel, width, factor, here - c, w.probabilities + r * kRow, c,
             w.rows, r);
      }
    }
  }

  void multiply(const Workspace<S>& w, int64_t queries, int64_t k, int64_t here) const {
    multiply_all<F>(w.out, queries, width, w.probabilities, kRow, 1, packed.values, total, k / F::kPer,
                    round_up(here, F::kPutVecs * kLanes) / F::kPer, k == 0);
  }
};

// Queries of a sample, one head.
template <typename S, typename Keys>
void attend(const Params& p, const Rows<typename S::Format::Value>& queries, int64_t head, int64_t num_keys,
            const Keys& keys, const Workspace<S>& w) {
  using F = typename S::Format;
  const int64_t padded = round_up(queries.count, Keys::kRows);
  constexpr int64_t row = Workspace<S>::row_of_probabilities();
  const float scale = p.scale / F::kUnit;
  const RowState& rows = w.rows;
  bool shifted = false;  // a row may have a reference
  S::pack_queries(queries, p.width, padded, w.queries);
  for (int64_t r = 0; r < padded; ++r) rows.total[r] = rows.rounded[r] = Vec{}, rows.reference[r] = 0.0f;
  for (int64_t k = 0; k < num_keys; k += kKeys<F>) {
    const int64_t left = num_keys - k, here = left < kKeys<F> ? left : kKeys<F>;
    const auto probabilities = [&] {
      for (int64_t r = 0; r < padded; ++r) rows.block[0][r] = rows.block[1][r] = Vec{};
      shifted ? keys.template scores<kShifted>(w, padded, k, here, scale)
              : keys.template scores<kPlain>(w, padded, k, here, scale);
    };
    probabilities();
    bool again = false;
    for (int64_t r = 0; r < queries.count; ++r) again = again || far(rows, r);
    if (again) {
      for (int64_t r = 0; r < padded; ++r) rows.top[r] = splat(kNever);
      keys.template scores<kPeak>(w, padded, k, here, scale < 0.0f ? -1.0f : 1.0f);
      rebase<F>(rows, queries.count, scale, w.out, p.width);
      shifted = true;
      probabilities();
      forget(rows, queries.count, w.probabilities, row);
    }
    for (int64_t r = 0; r < padded; ++r) {
      rows.total[r] += rows.block[0][r];
      if (!F::kKept) rows.rounded[r] += rows.block[1][r];
    }
    keys.multiply(w, padded, k, here);
  }
  auto* out = static_cast<typename F::Value*>(p.out);
  for (int64_t r = 0; r < queries.count; ++r) {
    const int64_t at = queries.index[r];
    const float base = rows.reference[r] * p.scale;  // infinite: the largest score is, and its share is NaN
    if (p.lse != nullptr)
      p.lse[head * p.rows_q + at] = __builtin_isinf(base) ? base : __builtin_logf(sum(rows.total[r])) + base;
    const float share = 1.0f / sum(rows.rounded[r]);
    const float* row_out = w.out + r * round_up(p.width, kLanes);
    columns(p.width, [&](int64_t i, int64_t n) {
      store(out + (at * p.heads + head) * p.width + i, load(row_out + i, n) * share, n);
    });
  }
}

}  // namespace UVG_ISA
}  // namespace uvg
