#include "cpu/per_thread.h"
#include "cpu/tile.h"
#include "uvg/flash_attention.h"

// Scores are computed transposed (keys by queries), so that lse and delta are vectors along the lanes and the
// probabilities and their gradients are left operands as they are stored. Nothing is transposed on the way.
namespace uvg {
namespace UVG_ISA {
namespace {

using Params = FlashAttentionParams;

constexpr int64_t kQueries = 192;  // of a block, as kKeys: multiples of kTileRows and kPanel
#if defined(__AVX512F__)
constexpr int64_t kKeys = 192;
#else
constexpr int64_t kKeys = 96;
#endif

template <typename F>
struct Workspace {
  uint32_t *queries_t, *douts_t, *queries, *douts, *keys;    // of a whole sample, one head
  uint32_t *key_rows, *value_rows;                           // of a block of keys
  uint32_t *probabilities, *scores, *scores_by_keys, *work;  // of a block; scores: their gradient
  float *lse, *delta;                                        // [queries]
  float *dq, *dk, *dv;                                       // dq of the sample; dk, dv of the block
  float* sums;                                               // [2, rows_k, columns] where samples share keys
  int64_t columns;

  static constexpr int64_t kRow = kQueries / F::kPer + kLanes;  // dwords; rows off one another's sets
  static constexpr int64_t kKeyRow = kQueries + kLanes;         // of scores_by_keys: pairs along the keys

  Workspace(Scratch& scratch, const Params& p) : columns(round_up(p.width, kLanes)) {
    const int64_t words = row_words<F>(p.width);
    const int64_t most_q = round_up(p.queries->longest(), kPanel), most_k = round_up(p.keys->longest(), kKeys);
    for (uint32_t** x : {&queries_t, &douts_t}) *x = scratch.words(most_q * words);
    for (uint32_t** x : {&queries, &douts}) *x = scratch.words(most_q / F::kPer * columns);
    keys = scratch.words(most_k / F::kPer * columns);
    for (uint32_t** x : {&key_rows, &value_rows}) *x = scratch.words(kKeys * words);
    for (uint32_t** x : {&probabilities, &scores}) *x = scratch.words(kKeys * kRow);
    scores_by_keys = F::kPer == 1 ? scores : scratch.words(kKeys / 2 * kKeyRow);
    work = scratch.words(kLanes * words);
    lse = scratch.floats(most_q), delta = scratch.floats(most_q);
    dq = scratch.floats((most_q + kTileRows) * columns);
    dk = scratch.floats(kKeys * columns), dv = scratch.floats(kKeys * columns);
    sums = p.keys->shared() ? scratch.floats(2 * p.rows_k * columns) : nullptr;
  }
};

// Probabilities of a tile, keys by queries, as the forward had them: power(score * scale - lse), in the format's unit.
template <typename F, int V>
UVG_NOINLINE void probability(const uint32_t* keys, const uint32_t* panel, int64_t width, float scale, const float* lse,
                              uint32_t* out, int64_t column) {
  Vec x[kTileRows][V] = {};
  multiply<F>(x, keys, row_words<F>(width), 1, panel, kPanel, depth_of<F>(width));
#pragma GCC unroll 6
  for (int64_t r = 0; r < kTileRows; ++r) {
    Vec p[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) p[j] = F::power(x[r][j] * scale - load(lse + j * kLanes));
    F::put(out + r * Workspace<F>::kRow, column, p);
  }
}

// Gradient of a tile of scores: p * (dp - delta). Of keys from `valid` on it is zero.
template <typename F, int V>
UVG_NOINLINE void score_gradient(const uint32_t* values, const uint32_t* panel, int64_t width, int64_t valid,
                                 const float* delta, const uint32_t* probabilities, uint32_t* out, uint32_t* by_keys,
                                 int64_t column) {
  constexpr int64_t row = Workspace<F>::kRow;
  Vec dp[kTileRows][V] = {};
  multiply<F>(dp, values, row_words<F>(width), 1, panel, kPanel, depth_of<F>(width));
#pragma GCC unroll 6
  for (int64_t r = 0; r < kTileRows; ++r) {
    Vec ds[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const Vec p = F::get(probabilities + r * row, column + j * kLanes);
      ds[j] = r < valid ? p * (dp[r][j] - load(delta + j * kLanes)) : Vec{};
    }
    F::put(out + r * row, column, ds);
    if (F::kPer == 2 && r % 2 == 1)
      pair_rows<F, V>(out + (r - 1) * row, row, column, by_keys + r / 2 * Workspace<F>::kKeyRow + column);
  }
}

// Of one sample and head: what every block of keys needs of the queries.
template <typename F>
void prepare(const Params& p, const Rows<typename F::Value>& q, const Rows<typename F::Value>& dout,
             const Rows<typename F::Value>& out, int64_t head, const Workspace<F>& w) {
  const int64_t padded = round_up(q.count, kPanel);
  pack_transposed<F>(q, p.width, w.queries_t, w.work);
  pack_transposed<F>(dout, p.width, w.douts_t, w.work);
  pack_columns<F>(q, p.width, padded, w.queries);
  pack_columns<F>(dout, p.width, padded, w.douts);
  for (int64_t i = 0; i < padded; ++i) {
    w.lse[i] = __builtin_inff(), w.delta[i] = 0.0f;  // no query: probability 0
    if (i >= q.count) continue;
    Vec dot = {};
    columns(p.width, [&](int64_t c, int64_t n) { dot += load(out.at(i) + c, n) * load(dout.at(i) + c, n); });
    w.delta[i] = sum(dot);
    w.lse[i] = p.lse[head * p.rows_q + q.index[i]] / F::kUnit;
  }
}

// Gradients of a block of keys and values, and their part of dq.
template <typename F>
void block(const Params& p, const Rows<typename F::Value>& k, const Rows<typename F::Value>& v, int64_t first_key,
           int64_t num_queries, int64_t num_keys, const Workspace<F>& w) {
  const int64_t words = row_words<F>(p.width), padded = round_up(k.count, kTileRows);
  const int64_t total_q = round_up(num_queries, kPanel) / F::kPer, total_k = round_up(num_keys, kKeys) / F::kPer;
  constexpr int64_t row = Workspace<F>::kRow;
  pack_rows<F>(k, p.width, padded, w.key_rows);
  pack_rows<F>(v, p.width, padded, w.value_rows);
  for (int64_t q = 0; q < num_queries; q += kQueries) {
    const int64_t left = round_up(num_queries - q, F::kPutVecs * kLanes), here = left < kQueries ? left : kQueries;
    for (int64_t c = 0; c < here; c += kPanel) {
      with_vecs<F>(here - c, [&](auto vecs) {
        for (int64_t r = 0; r < padded; r += kTileRows)
          probability<F, decltype(vecs)::value>(w.key_rows + r * words, w.queries_t + (q + c) * words, p.width,
                                                p.scale / F::kUnit, w.lse + q + c, w.probabilities + r * row, c);
        for (int64_t r = 0; r < padded; r += kTileRows)
          score_gradient<F, decltype(vecs)::value>(
              w.value_rows + r * words, w.douts_t + (q + c) * words, p.width, k.count - r, w.delta + q + c,
              w.probabilities + r * row, w.scores + r * row, w.scores_by_keys + r / 2 * Workspace<F>::kKeyRow, c);
      });
    }
    const int64_t depth = here / F::kPer, skip = q / F::kPer;
    multiply_all<F>(w.dv, padded, p.width, w.probabilities, row, 1, w.douts, total_q, skip, depth, q == 0);
    multiply_all<F>(w.dk, padded, p.width, w.scores, row, 1, w.queries, total_q, skip, depth, q == 0);
    const int64_t step = F::kPer == 1 ? row : Workspace<F>::kKeyRow;
    multiply_all<F>(w.dq + q * w.columns, round_up(here, kTileRows), p.width, w.scores_by_keys, 1, step, w.keys,
                    total_k, first_key / F::kPer, round_up(k.count, F::kPer) / F::kPer, first_key == 0);
  }
}

template <typename T>
void write(const float* x, float scale, int64_t width, T* out) {
  columns(width, [&](int64_t i, int64_t n) { store(out + i, load(x + i, n) * scale, n); });
}

template <typename T>
void zero(const RowLists& lists, int64_t list, int64_t size, T* out) {
  for (int64_t i = 0; i < lists.size(list); ++i)
    std::memset(out + lists.rows(list)[i] * size, 0, static_cast<size_t>(size) * sizeof(T));
}

template <typename F>
struct Task {
  using T = typename F::Value;
  const Params& p;
  const Workspace<F>& w;
  int64_t head;

  Rows<T> rows(const void* x, const RowLists& lists, int64_t s) const {
    return {static_cast<const T*>(x) + head * p.width, p.heads * p.width, lists.rows(s), lists.size(s)};
  }

  T* at(void* x, int64_t row) const { return static_cast<T*>(x) + (row * p.heads + head) * p.width; }

  // One sample. sum_k, sum_v: fp32 [rows_k, columns] that other samples add to as well, or null.
  void run(int64_t s, float* sum_k, float* sum_v) const {
    const Rows<T> q = rows(p.q, *p.queries, s), k = rows(p.k, *p.keys, s), v = rows(p.v, *p.keys, s);
    if (q.count == 0 || k.count == 0) return;
    prepare<F>(p, q, rows(p.dout, *p.queries, s), rows(p.out, *p.queries, s), head, w);
    pack_columns<F>(k, p.width, round_up(k.count, kKeys), w.keys);
    for (int64_t first = 0; first < k.count; first += kKeys) {
      const int64_t count = k.count - first < kKeys ? k.count - first : kKeys;
      block<F>(p, k.from(first, count), v.from(first, count), first, q.count, k.count, w);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = k.index[first + i];
        if (sum_k == nullptr) {
          write(w.dk + i * w.columns, p.scale, p.width, at(p.dk, row));
          write(w.dv + i * w.columns, 1.0f, p.width, at(p.dv, row));
          continue;
        }
        columns(w.columns, [&](int64_t c, int64_t n) {
          add_to(sum_k + row * w.columns + c, load(w.dk + i * w.columns + c), n);
          add_to(sum_v + row * w.columns + c, load(w.dv + i * w.columns + c), n);
        });
      }
    }
    for (int64_t i = 0; i < q.count; ++i) write(w.dq + i * w.columns, p.scale, p.width, at(p.dq, q.index[i]));
  }
};

// A task is one head of one sample; where samples share keys, one head of all samples, in their order.
template <typename F>
void backward(const Params& p) {
  using T = typename F::Value;
  const int64_t samples = p.queries->samples(), size = p.heads * p.width;
  const bool shared = p.keys->shared();
  zero(*p.queries, samples, size, static_cast<T*>(p.dq));
  for (T* dx : {static_cast<T*>(p.dk), static_cast<T*>(p.dv)}) {
    zero(*p.keys, samples, size, dx);
    for (int64_t s = 0; s < samples && !shared; ++s)
      if (p.queries->size(s) == 0) zero(*p.keys, s, size, dx);
  }
  for (int64_t s = 0; s < samples; ++s)
    if (p.keys->size(s) == 0) zero(*p.queries, s, size, static_cast<T*>(p.dq));
  Scratch scratch;
  const PerThread<Workspace<F>> workspaces(scratch, p.threads, p);
#pragma omp parallel num_threads(p.threads)
  {
    const Workspace<F>& w = workspaces.own();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (shared ? 1 : samples) * p.heads; ++i) {
      const Task<F> task{p, w, i % p.heads};
      if (!shared) {
        task.run(i / p.heads, nullptr, nullptr);
        continue;
      }
      float *sum_k = w.sums, *sum_v = sum_k + p.rows_k * w.columns;
      std::memset(sum_k, 0, static_cast<size_t>(2 * p.rows_k * w.columns) * sizeof(float));
      for (int64_t s = 0; s < samples; ++s) task.run(s, sum_k, sum_v);
      for (int64_t row = 0; row < p.rows_k; ++row) {
        write(sum_k + row * w.columns, p.scale, p.width, task.at(p.dk, row));
        write(sum_v + row * w.columns, 1.0f, p.width, task.at(p.dv, row));
      }
    }
  }
}

}  // namespace

void flash_attention_backward(const Params& p) {
  p.dtype == Dtype::kFloat32 ? backward<Singles<float>>(p) : backward<Halves>(p);
}

}  // namespace UVG_ISA
}  // namespace uvg
