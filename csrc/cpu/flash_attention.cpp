#include "uvg/flash_attention.h"

#include "cpu/exp.h"
#include "cpu/tile.h"

// The scores of a tile never reach memory: scaled, exponentiated and rounded in registers, they are stored as the left
// operand of the product with the values. The exponent's reference is 0 until a score asks for another one, so that
// ordinary rows never rescale (figures: AGENTS.md).
namespace uvg {
namespace UVG_ISA {
namespace {

using Params = FlashAttentionParams;

constexpr int64_t kQueries = 192;  // rows of a block; a multiple of kTileRows
constexpr float kHigh = 40.0f;     // from there on a row takes another reference
constexpr float kNever = -__builtin_inff();

template <typename F>
constexpr int64_t kKeys = F::kPer == 2 ? 512 : 256;  // keys of a block

// Softmax of the rows of a block so far. x = score * scale - reference.
struct RowState {
  Vec* top;       // largest x of the block of keys, lane by lane
  Vec* total;     // sum of e^x in fp32
  Vec* rounded;   // sum of e^x as the product reads it
  Vec* block[2];  // total and rounded of this block of keys alone
  float* reference;
};

template <typename F>
struct Workspace {
  uint32_t *keys, *values, *queries, *probabilities, *work;
  float* out;
  RowState rows;

  Workspace(Scratch& scratch, const Params& p) {
    const int64_t words = row_words<F>(p.width), most = round_up(p.keys->longest(), kPanel);
    keys = scratch.words(most * words);
    values = scratch.words(most / F::kPer * round_up(p.width, kLanes));
    queries = scratch.words(kQueries * words);
    probabilities = scratch.words(kQueries * row_of_probabilities());
    work = scratch.words(kLanes * words);
    out = scratch.floats(kQueries * round_up(p.width, kLanes));
    for (Vec** sums : {&rows.top, &rows.total, &rows.rounded, &rows.block[0], &rows.block[1]})
      *sums = reinterpret_cast<Vec*>(scratch.floats(kQueries * kLanes));
    rows.reference = scratch.floats(kQueries);
  }

  static constexpr int64_t row_of_probabilities() {
    return kKeys<F> / F::kPer + kLanes;
  }  // rows off one another's sets
};

// One tile of scores to probabilities; keys from `valid` on count nothing.
template <typename F, bool kTail>
UVG_NOINLINE void score(const uint32_t* queries, const uint32_t* panel, int64_t width, float scale, int64_t valid,
                        uint32_t* probabilities, int64_t column, const RowState& rows, int64_t first) {
  Vec x[kTileRows][kTileVecs] = {};
  multiply<F, kTileVecs>(x, queries, row_words<F>(width), 1, panel, depth_of<F>(width));
#pragma GCC unroll 6
  for (int64_t r = 0; r < kTileRows; ++r) {
    const int64_t row = first + r;
    const Vec reference = splat(rows.reference[row]);
    Vec p[kTileVecs], top = rows.top[row], total = rows.block[0][row];
#pragma GCC unroll 4
    for (int j = 0; j < kTileVecs; ++j) {
      Vec at = x[r][j] * scale - reference;
      if (kTail) at = first_lanes(valid - j * kLanes) ? at : splat(kNever);
      top = at > top ? at : top;
      p[j] = F::kPer == 1 ? exp(at) : exp2(at * kLog2E);  // bf16 does not see the difference
      total += p[j];
    }
    rows.top[row] = top;
    rows.block[0][row] = total;
    rows.block[1][row] = F::rounded_sum(rows.block[1][row], p);
    F::put(probabilities + r * Workspace<F>::row_of_probabilities(), column, p);
  }
}

float largest(Vec v) {
  float most = kNever;
  for (int64_t i = 0; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// Rows whose x left the range take their largest score as reference. Returns whether there were any: then the block of
// keys must be done again.
bool rebase(const RowState& rows, int64_t count, bool first, float* out, int64_t width) {
  bool any = false;
  for (int64_t r = 0; r < count; ++r) {
    const float top = largest(rows.top[r]);
    if (!(top > kHigh || (first && top < -kHigh)) || top == kNever) continue;
    any = true;
    rows.reference[r] += top;
    if (first) continue;
    const float shrink = exp2(splat(-top * kLog2E))[0];
    rows.total[r] *= shrink, rows.rounded[r] *= shrink;
    float* row = out + r * round_up(width, kLanes);
    for (int64_t i = 0; i < width; i += kLanes) store(row + i, load(row + i) * shrink);
  }
  return any;
}

// Queries `first`.. of a sample, one head; keys and values are packed.
template <typename F>
void attend(const Params& p, const Rows<typename F::Value>& queries, int64_t head, int64_t num_keys,
            const Workspace<F>& w) {
  const int64_t padded = round_up(queries.count, kTileRows), words = row_words<F>(p.width);
  const int64_t total = round_up(num_keys, kPanel) / F::kPer;
  constexpr int64_t row = Workspace<F>::row_of_probabilities();
  const float scale = p.scale;
  pack_rows<F>(queries, p.width, padded, w.queries);
  for (int64_t r = 0; r < padded; ++r) w.rows.total[r] = w.rows.rounded[r] = Vec{}, w.rows.reference[r] = 0.0f;
  for (int64_t k = 0; k < num_keys; k += kKeys<F>) {
    const int64_t left = num_keys - k, here = left < kKeys<F> ? left : kKeys<F>;
    for (int attempt = 0; attempt < 2; ++attempt) {
      for (int64_t r = 0; r < padded; ++r)
        w.rows.top[r] = splat(kNever), w.rows.block[0][r] = w.rows.block[1][r] = Vec{};
      for (int64_t c = 0; c < here; c += kPanel)
        for (int64_t r = 0; r < padded; r += kTileRows) {
          const auto tile = here - c < kPanel ? score<F, true> : score<F, false>;
          tile(w.queries + r * words, w.keys + (k + c) * words, p.width, scale, here - c, w.probabilities + r * row, c,
               w.rows, r);
        }
      if (attempt == 1 || !rebase(w.rows, queries.count, k == 0, w.out, p.width)) break;
    }
    for (int64_t r = 0; r < padded; ++r) w.rows.total[r] += w.rows.block[0][r], w.rows.rounded[r] += w.rows.block[1][r];
    multiply_all<F>(w.out, padded, p.width, w.probabilities, row, 1, w.values, total, k / F::kPer,
                    round_up(here, kPanel) / F::kPer, k == 0);
  }
  auto* out = static_cast<typename F::Value*>(p.out);
  for (int64_t r = 0; r < queries.count; ++r) {
    const int64_t at = queries.index[r];
    p.lse[head * p.rows_q + at] = __builtin_logf(sum(w.rows.total[r])) + w.rows.reference[r];
    const float share = 1.0f / sum(w.rows.rounded[r]);
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
    for (int64_t head = 0; head < p.heads; ++head) p.lse[head * p.rows_q + row] = kNever;
  }
}

// Sample, head and part of the queries of a task: whole samples where there are enough of them for the threads. Cutting
// costs packing the keys again and changes no bit.
template <typename F>
void forward(const Params& p) {
  using T = typename F::Value;
  const int64_t samples = p.queries->samples(), pairs = samples * p.heads;
  const int64_t parts = p.threads > 1 && pairs < 4 * p.threads && pairs > 0 ? (4 * p.threads + pairs - 1) / pairs : 1;
  const int64_t part = round_up((p.queries->longest() + parts - 1) / parts, kQueries);
  without_keys<T>(p, samples);
  for (int64_t s = 0; s < samples; ++s)
    if (p.keys->size(s) == 0) without_keys<T>(p, s);
#pragma omp parallel num_threads(p.threads)
  {
    Scratch scratch;
    const Workspace<F> w(scratch, p);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs * parts; ++task) {
      const int64_t head = task % p.heads, s = task / p.heads % samples, first = task / pairs * part;
      const int64_t num_keys = p.keys->size(s), end = first + part, all = p.queries->size(s);
      const int64_t last = end < all ? end : all;
      if (num_keys == 0 || first >= last) continue;
      const auto rows_of = [&](const void* x, const int32_t* index, int64_t count) {
        return Rows<T>{static_cast<const T*>(x) + head * p.width, p.heads * p.width, index, count};
      };
      pack_transposed<F>(rows_of(p.k, p.keys->rows(s), num_keys), p.width, w.keys, w.work);
      pack_columns<F>(rows_of(p.v, p.keys->rows(s), num_keys), p.width, round_up(num_keys, kPanel), w.values);
      const Rows<T> queries = rows_of(p.q, p.queries->rows(s), all);
      for (int64_t q = first; q < last; q += kQueries)
        attend<F>(p, queries.from(q, last - q < kQueries ? last - q : kQueries), head, num_keys, w);
    }
  }
}

}  // namespace

void flash_attention_forward(const Params& p) {
  if (p.dtype == Dtype::kFloat32) return forward<Singles<float>>(p);
#if defined(__AVX512BF16__)
  forward<Pairs>(p);
#else
  forward<Singles<BFloat16>>(p);
#endif
}

}  // namespace UVG_ISA
}  // namespace uvg
