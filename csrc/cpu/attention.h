// Softmax attention forward, for kernels that differ in how they come to the scores (S).
//
// S has: Format, in which probabilities meet the values; query_words, panel_words, work_words: of a packed query, of
// kPanel packed keys and of room to pack them in, all of rows of `width` values; pack_queries, pack_keys; multiply, a
// tile of products; scale_of, what a query's products are multiplied with to be scores; kScaled, whether that is not 1.
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
constexpr int64_t kFew = 24;            // rows of a task at the least
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

template <typename S>
struct Workspace {
  using F = typename S::Format;
  uint32_t *queries, *probabilities, *work;
  float* out;
  RowState rows;
  Packed<S> packed;  // `slots` of keys and values

  Workspace(Scratch& scratch, const Params& p, int64_t slots) : packed(scratch, p, slots) {
    queries = scratch.words(kQueries * S::query_words(p.width));
    probabilities = scratch.words(kQueries * row_of_probabilities());
    work = scratch.words(S::work_words(p.width));
    out = scratch.floats(kQueries * round_up(p.width, kLanes));
    for (Vec** sums : {&rows.top, &rows.total, &rows.rounded, &rows.block[0], &rows.block[1]})
      *sums = reinterpret_cast<Vec*>(scratch.floats(kQueries * kLanes));
    if (F::kKept) rows.rounded = rows.total, rows.block[1] = rows.block[0];
    rows.reference = scratch.floats(kQueries);
  }

  static constexpr int64_t row_of_probabilities() {
    return kKeys<F> / F::kPer + kLanes;
  }  // rows off one another's sets
};

enum What { kPlain, kShifted, kPeak };

template <What kWhat>
struct Kind {
  static constexpr What value = kWhat;
};

// One tile of scores to probabilities and their sums, kPlain where all references are 0; or, with kPeak, to the largest
// score of each row. V vectors of keys; those from `valid` on count nothing.
template <typename S, int V, bool kTail, What kWhat>
UVG_NOINLINE void score(const uint32_t* queries, const uint32_t* panel, int64_t width, float scale, int64_t valid,
                        uint32_t* probabilities, int64_t column, const RowState& rows, int64_t first) {
  using F = typename S::Format;
  Vec x[kTileRows][V];
  S::multiply(x, queries, panel, width);
#pragma GCC unroll 6
  for (int64_t r = 0; r < kTileRows; ++r) {
    const int64_t row = first + r;
    const Vec reference = splat(rows.reference[row]);
    const bool moved = kWhat == kShifted && (!S::kScaled || rows.reference[row] != 0.0f);  // bits are the row's own
    const float by = S::scale_of(queries + r * S::query_words(width), width), whole = by * scale;
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      x[r][j] = moved ? (x[r][j] * by - reference) * scale : x[r][j] * whole;
      if (kTail) x[r][j] = select(first_lanes(valid - j * kLanes), x[r][j], splat(kNever));
    }
    if (kWhat == kPeak) {
      for (int j = 0; j < V; ++j) rows.top[row] = select(x[r][j] > rows.top[row], x[r][j], rows.top[row]);
      continue;
    }
    Vec p[V], total = rows.block[0][row];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      p[j] = F::power(x[r][j]);
      total += p[j];
    }
    rows.block[0][row] = total;
    if (!F::kKept) rows.block[1][row] = F::rounded_sum(rows.block[1][row], p);
    F::put(probabilities + r * Workspace<S>::row_of_probabilities(), column, p);
  }
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

// Queries of a sample, one head; its keys and values are packed.
template <typename S>
void attend(const Params& p, const Rows<typename S::Format::Value>& queries, int64_t head, int64_t num_keys,
            const Packed<S>& packed, const Workspace<S>& w) {
  using F = typename S::Format;
  const int64_t padded = round_up(queries.count, kTileRows), words = S::query_words(p.width);
  const int64_t total = round_up(num_keys, kPanel) / F::kPer;
  constexpr int64_t row = Workspace<S>::row_of_probabilities();
  const float scale = p.scale / F::kUnit;
  const RowState& rows = w.rows;
  bool shifted = false;  // a row may have a reference
  S::pack_queries(queries, p.width, padded, w.queries);
  for (int64_t r = 0; r < padded; ++r) rows.total[r] = rows.rounded[r] = Vec{}, rows.reference[r] = 0.0f;
  for (int64_t k = 0; k < num_keys; k += kKeys<F>) {
    const int64_t left = num_keys - k, here = left < kKeys<F> ? left : kKeys<F>;
    const auto scores = [&](auto what, float factor) {
      for (int64_t c = 0; c < here; c += kPanel) {
        auto* tile = score<S, kTileVecs, false, decltype(what)::value>;
        if (here - c < kPanel)
          with_vecs<F>(here - c,
                       [&](auto vecs) { tile = score<S, decltype(vecs)::value, true, decltype(what)::value>; });
        for (int64_t r = 0; r < padded; r += kTileRows)
          tile(w.queries + r * words, packed.keys + (k + c) / kPanel * S::panel_words(p.width), p.width, factor,
               here - c, w.probabilities + r * row, c, rows, r);
      }
    };
    const auto probabilities = [&] {
      for (int64_t r = 0; r < padded; ++r) rows.block[0][r] = rows.block[1][r] = Vec{};
      shifted ? scores(Kind<kShifted>{}, scale) : scores(Kind<kPlain>{}, scale);
    };
    probabilities();
    bool again = false;
    for (int64_t r = 0; r < queries.count; ++r) again = again || far(rows, r);
    if (again) {
      for (int64_t r = 0; r < padded; ++r) rows.top[r] = splat(kNever);
      scores(Kind<kPeak>{}, scale < 0.0f ? -1.0f : 1.0f);
      rebase<F>(rows, queries.count, scale, w.out, p.width);
      shifted = true;
      probabilities();
      forget(rows, queries.count, w.probabilities, row);
    }
    for (int64_t r = 0; r < padded; ++r) {
      rows.total[r] += rows.block[0][r];
      if (!F::kKept) rows.rounded[r] += rows.block[1][r];
    }
    multiply_all<F>(w.out, padded, p.width, w.probabilities, row, 1, packed.values, total, k / F::kPer,
                    round_up(here, F::kPutVecs * kLanes) / F::kPer, k == 0);
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

template <typename T>
void without_keys(const Params& p, int64_t list) {
  for (int64_t i = 0; i < p.queries->size(list); ++i) {
    const int64_t row = p.queries->rows(list)[i], size = p.heads * p.width;
    std::memset(static_cast<T*>(p.out) + row * size, 0, static_cast<size_t>(size) * sizeof(T));
    for (int64_t head = 0; p.lse != nullptr && head < p.heads; ++head) p.lse[head * p.rows_q + row] = kNever;
  }
}

// Sample, head and part of the queries of a task: whole samples where there are enough of them for the threads, each
// with its keys packed on the way. Else samples are cut, where there are few rows into tasks of less than a block, and
// their keys are packed before. Cutting changes no bit.
template <typename S>
void attention(const Params& p) {
  using T = typename S::Format::Value;
  const int64_t samples = p.queries->samples(), pairs = samples * p.heads, size = p.heads * p.width;
  const int threads = threads_for_products(p.threads, 2 * p.rows_q * p.keys->longest() * size);
  const int64_t parts = threads > 1 && pairs < 4 * threads && pairs > 0 ? (4 * threads + pairs - 1) / pairs : 1;
  const int64_t share = (p.queries->longest() + parts - 1) / parts;
  const int64_t part = share < kQueries ? round_up(share > kFew ? share : kFew, kTileRows) : round_up(share, kQueries);
  without_keys<T>(p, samples);
  for (int64_t s = 0; s < samples; ++s)
    if (p.keys->size(s) == 0) without_keys<T>(p, s);
  Scratch scratch;
  const Packed<S> shared(scratch, p, parts > 1 ? pairs : 0);
  const PerThread<Workspace<S>> workspaces(scratch, threads, p, parts > 1 ? 0 : 1);
#pragma omp parallel num_threads(threads)
  {
    const Workspace<S>& w = workspaces.own();
    if (parts > 1) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < 2 * pairs; ++i) {
        const auto pack = i % 2 == 0 ? pack_keys<S> : pack_values<S>;
        pack(p, i / 2 / p.heads, i / 2 % p.heads, shared.slot(i / 2), w.work);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs * parts; ++task) {
      const int64_t pair = task % pairs, s = pair / p.heads, head = pair % p.heads, first = task / pairs * part;
      const int64_t end = first + part, all = p.queries->size(s), last = end < all ? end : all;
      if (p.keys->size(s) == 0 || first >= last) continue;
      if (parts == 1) pack_keys<S>(p, s, head, w.packed, w.work), pack_values<S>(p, s, head, w.packed, w.work);
      const Rows<T> queries = rows_of<T>(p, p.q, head, *p.queries, s);
      for (int64_t q = first; q < last; q += kQueries)
        attend<S>(p, queries.from(q, last - q < kQueries ? last - q : kQueries), head, p.keys->size(s),
                  parts > 1 ? shared.slot(pair) : w.packed, w);
    }
  }
}

}  // namespace UVG_ISA
}  // namespace uvg
