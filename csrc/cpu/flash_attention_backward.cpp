#include <sched.h>

#include "cpu/attention_backward_few.h"
#include "cpu/per_thread.h"
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

constexpr int64_t kWholeRounds = 8;  // of samples' heads by all threads, from which on none is cut; untuned

// What all blocks of keys of a sample's head read and add to.
template <typename F>
struct Sample {
  uint32_t *queries_t, *douts_t, *queries, *douts, *keys;
  float *lse, *delta;  // [queries]
  float* dq;
  int64_t* added;  // of each block of queries: blocks of keys whose part dq has
  int64_t columns;

  Sample(Scratch& scratch, const Params& p) : columns(round_up(p.width, kLanes)) {
    const int64_t words = row_words<F>(p.width);
    const int64_t most_q = round_up(p.queries->longest(), kPanel), most_k = round_up(p.keys->longest(), kLanes);
    for (uint32_t** x : {&queries_t, &douts_t}) *x = scratch.words(most_q * words);
    for (uint32_t** x : {&queries, &douts}) *x = scratch.words(most_q / F::kPer * columns);
    keys = scratch.words(most_k / F::kPer * columns);
    lse = scratch.floats(most_q), delta = scratch.floats(most_q);
    dq = scratch.floats((most_q + kTileRows) * columns);
    added = reinterpret_cast<int64_t*>(scratch.words(2 * (most_q / kQueries + 1)));
  }
};

// What a thread works in at a block of keys.
template <typename F>
struct Workspace {
  Sample<F> sample;                                          // its own
  uint32_t *key_rows, *value_rows;                           // of a block of keys
  uint32_t *probabilities, *scores, *scores_by_keys, *work;  // of a block; scores: their gradient
  float *dk, *dv;
  float* sums;  // [2, rows_k, columns] where samples share keys

  static constexpr int64_t kRow = kQueries / F::kPer + kLanes;  // dwords; rows off one another's sets
  static constexpr int64_t kKeyRow = kQueries + kLanes;         // of scores_by_keys: pairs along the keys

  Workspace(Scratch& scratch, const Params& p) : sample(scratch, p) {
    const int64_t words = row_words<F>(p.width), columns = sample.columns;
    const int64_t longest = p.keys->longest(), most = longest < kKeys ? round_up(longest, 2 * kTileRows) : kKeys;
    for (uint32_t** x : {&key_rows, &value_rows}) *x = scratch.words(most * words);
    for (uint32_t** x : {&probabilities, &scores}) *x = scratch.words(most * kRow);
    scores_by_keys = F::kPer == 1 ? scores : scratch.words(most / 2 * kKeyRow);
    work = scratch.words(kLanes * words);
    dk = scratch.floats(most * columns), dv = scratch.floats(most * columns);
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
      pair_rows<V>(out + (r - 1) * row, row, column, by_keys + r / 2 * Workspace<F>::kKeyRow + column);
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

inline void wait_for(const int64_t& count, int64_t value) {
  for (int64_t looks = 0; __atomic_load_n(&count, __ATOMIC_ACQUIRE) != value; ++looks)
    if (looks > 1000) sched_yield();
}

// One sample's head, in any of the threads.
template <typename F>
struct Task {
  using T = typename F::Value;
  const Params& p;
  const Sample<F>& all;
  int64_t head;
  Rows<T> q, k, v, dout, out;

  Task(const Params& p, const Sample<F>& all, int64_t s, int64_t head) : p(p), all(all), head(head) {
    const auto rows = [&](const void* x, const RowLists& lists) {
      return Rows<T>{static_cast<const T*>(x) + head * p.width, p.heads * p.width, lists.rows(s), lists.size(s)};
    };
    q = rows(p.q, *p.queries), dout = rows(p.dout, *p.queries), out = rows(p.out, *p.queries);
    k = rows(p.k, *p.keys), v = rows(p.v, *p.keys);
  }

  T* at(void* x, int64_t row) const { return static_cast<T*>(x) + (row * p.heads + head) * p.width; }

  // What every block of keys needs, in kParts that may run at once.
  static constexpr int64_t kParts = 3;

  void prepare(int64_t part, uint32_t* work) const {
    const int64_t padded = round_up(q.count, kPanel);
    if (part < 2) {
      pack_transposed<F>(part == 0 ? q : dout, p.width, part == 0 ? all.queries_t : all.douts_t, work);
      pack_columns<F>(part == 0 ? q : dout, p.width, padded, part == 0 ? all.queries : all.douts);
      return;
    }
    pack_columns<F>(k, p.width, round_up(k.count, kLanes), all.keys);
    for (int64_t i = 0; i < padded; i += kQueries) all.added[i / kQueries] = 0;
    for (int64_t i = 0; i < padded; ++i) {
      all.lse[i] = __builtin_inff(), all.delta[i] = 0.0f;  // no query: probability 0
      if (i >= q.count) continue;
      Vec dot = {};
      columns(p.width, [&](int64_t c, int64_t n) { dot += load(out.at(i) + c, n) * load(dout.at(i) + c, n); });
      all.delta[i] = sum(dot);
      all.lse[i] = p.lse[head * p.rows_q + q.index[i]] / F::kUnit;
    }
  }

  // Gradients of a block of keys and values, into w, and their part of dq: after the block before, so that no bit
  // depends on who is first. The last block writes dq.
  void block(int64_t first_key, const Workspace<F>& w) const {
    const Rows<T> keys = k.from(first_key, here(first_key)), values = v.from(first_key, here(first_key));
    const int64_t words = row_words<F>(p.width), padded = round_up(keys.count, kTileRows);
    const int64_t total_q = round_up(q.count, kPanel) / F::kPer, total_k = round_up(k.count, kLanes) / F::kPer;
    constexpr int64_t row = Workspace<F>::kRow;
    pack_rows<F>(keys, p.width, padded, w.key_rows);
    pack_rows<F>(values, p.width, padded, w.value_rows);
    for (int64_t i = 0; i < q.count; i += kQueries) {
      const int64_t left = round_up(q.count - i, F::kPutVecs * kLanes), count = left < kQueries ? left : kQueries;
      for (int64_t c = 0; c < count; c += kPanel) {
        with_vecs<F>(count - c, [&](auto vecs) {
          for (int64_t r = 0; r < padded; r += kTileRows)
            probability<F, decltype(vecs)::value>(w.key_rows + r * words, all.queries_t + (i + c) * words, p.width,
                                                  p.scale / F::kUnit, all.lse + i + c, w.probabilities + r * row, c);
          for (int64_t r = 0; r < padded; r += kTileRows)
            score_gradient<F, decltype(vecs)::value>(
                w.value_rows + r * words, all.douts_t + (i + c) * words, p.width, keys.count - r, all.delta + i + c,
                w.probabilities + r * row, w.scores + r * row, w.scores_by_keys + r / 2 * Workspace<F>::kKeyRow, c);
        });
      }
      const int64_t depth = count / F::kPer, skip = i / F::kPer;
      multiply_all<F>(w.dv, padded, p.width, w.probabilities, row, 1, all.douts, total_q, skip, depth, i == 0);
      multiply_all<F>(w.dk, padded, p.width, w.scores, row, 1, all.queries, total_q, skip, depth, i == 0);
      const int64_t step = F::kPer == 1 ? row : Workspace<F>::kKeyRow;
      int64_t& added = all.added[i / kQueries];
      wait_for(added, first_key / kKeys);
      multiply_all<F>(all.dq + i * all.columns, round_up(count, kTileRows), p.width, w.scores_by_keys, 1, step,
                      all.keys, total_k, first_key / F::kPer, round_up(keys.count, F::kPer) / F::kPer, first_key == 0);
      __atomic_store_n(&added, first_key / kKeys + 1, __ATOMIC_RELEASE);
      if (first_key + keys.count < k.count) continue;
      for (int64_t j = i; j < i + kQueries && j < q.count; ++j)
        write(all.dq + j * all.columns, p.scale, p.width, at(p.dq, q.index[j]));
    }
  }

  int64_t here(int64_t first_key) const { return k.count - first_key < kKeys ? k.count - first_key : kKeys; }

  void write_block(int64_t first_key, const Workspace<F>& w) const {
    for (int64_t i = 0; i < here(first_key); ++i) {
      write(w.dk + i * all.columns, p.scale, p.width, at(p.dk, k.index[first_key + i]));
      write(w.dv + i * all.columns, 1.0f, p.width, at(p.dv, k.index[first_key + i]));
    }
  }

  // To sums that other samples' keys go to as well.
  void add_block(int64_t first_key, const Workspace<F>& w) const {
    for (int64_t i = 0; i < here(first_key); ++i) {
      float* sum = w.sums + k.index[first_key + i] * all.columns;
      columns(all.columns, [&](int64_t c, int64_t n) {
        add_to(sum + c, load(w.dk + i * all.columns + c), n);
        add_to(sum + p.rows_k * all.columns + c, load(w.dv + i * all.columns + c), n);
      });
    }
  }

  void run(const Workspace<F>& w, bool adds) const {
    if (q.count == 0 || k.count == 0) return;
    for (int64_t part = 0; part < kParts; ++part) prepare(part, w.work);
    for (int64_t first = 0; first < k.count; first += kKeys) {
      block(first, w);
      adds ? add_block(first, w) : write_block(first, w);
    }
  }
};

inline bool is_few(const Params& p, int64_t s) { return p.queries->size(s) <= kFewQueries; }

// One head of all samples that share keys, in their order.
template <typename F>
void run_shared(const Params& p, int64_t head, const Workspace<F>& w, const FewRoom& room) {
  const int64_t samples = p.queries->samples(), columns = w.sample.columns;
  std::memset(w.sums, 0, static_cast<size_t>(2 * p.rows_k * columns) * sizeof(float));
  for (int64_t s = 0; s < samples; ++s) {
    if (!p.keys->shares(s) || p.queries->size(s) == 0) continue;
    if (is_few(p, s))
      Few<F>(p, s, head, 1, room, w.sums).run();
    else
      Task<F>(p, w.sample, s, head).run(w, true);
  }
  for (int64_t s = 0; s < samples; ++s) {
    if (!p.keys->shares(s)) continue;
    const Task<F> task(p, w.sample, s, head);
    for (int64_t i = 0; i < task.k.count; ++i) {  // what several samples have is written as often, the same each time
      const int64_t row = task.k.index[i];
      write(w.sums + row * columns, p.scale, p.width, task.at(p.dk, row));
      write(w.sums + (p.rows_k + row) * columns, 1.0f, p.width, task.at(p.dv, row));
    }
  }
}

// Samples of few queries and keys of their own, in groups of heads that one thread does.
template <typename F>
void backward_of_few(const Params& p, int threads, const PerThread<FewRoom>& rooms) {
  const int64_t samples = p.queries->samples();
  const int64_t groups = threads == 1 ? 1 : (4 * threads + samples - 1) / samples;
  const int64_t heads = (p.heads + groups - 1) / groups, parts = (p.heads + heads - 1) / heads;
#pragma omp for schedule(dynamic, 1) nowait
  for (int64_t i = 0; i < samples * parts; ++i) {
    const int64_t s = i / parts, first = i % parts * heads, left = p.heads - first;
    if (is_few(p, s) && !p.keys->shares(s) && p.queries->size(s) > 0 && p.keys->size(s) > 0)
      Few<F>(p, s, first, left < heads ? left : heads, rooms.own()).run();
  }
}

// A task is one head of one sample. The last of them, fewer than threads, are cut into their blocks of keys, which are
// taken in order: who waits for a block before waits for one that is being worked on. Samples that share keys are one
// task a head. What a task is depends on its sample alone, and so do its bits.
template <typename F>
void backward(const Params& p) {
  using T = typename F::Value;
  const int64_t samples = p.queries->samples(), size = p.heads * p.width;
  const bool shared = p.keys->shared();
  zero(*p.queries, samples, size, static_cast<T*>(p.dq));
  for (T* dx : {static_cast<T*>(p.dk), static_cast<T*>(p.dv)}) {
    zero(*p.keys, samples, size, dx);
    for (int64_t s = 0; s < samples; ++s)
      if (p.queries->size(s) == 0) zero(*p.keys, s, size, dx);
  }
  int64_t products = 0;
  bool few = false, many = shared, own = false;  // own: many queries and keys of its own
  for (int64_t s = 0; s < samples; ++s) {
    if (p.keys->size(s) == 0) zero(*p.queries, s, size, static_cast<T*>(p.dq));
    products += p.queries->size(s) * p.keys->size(s) * size;
    is_few(p, s) ? few = true : many = true;
    own = own || (!is_few(p, s) && !p.keys->shares(s));
  }
  const int threads = threads_for_products(p.threads, 5 * products);
  const int64_t pairs = own ? samples * p.heads : 0, longest = p.keys->longest();
  const int64_t cut = shared || longest <= kKeys || pairs > kWholeRounds * threads ? 0 : pairs % threads;
  int64_t next = 0;
  Scratch scratch;
  const PerThread<FewRoom> rooms(scratch, few || shared ? threads : 0, p);
  const PerThread<Workspace<F>> workspaces(scratch, many ? threads : 0, p);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (few) backward_of_few<F>(p, threads, rooms);
    if (many) {
      const Workspace<F>& w = workspaces.own();
      const auto mine = [&](int64_t s) { return !is_few(p, s) && !p.keys->shares(s); };
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t head = 0; head < (shared ? p.heads : 0); ++head) run_shared<F>(p, head, w, rooms.own());
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < pairs - cut; ++i)
        if (mine(i / p.heads)) Task<F>(p, w.sample, i / p.heads, i % p.heads).run(w, false);
      if (cut > 0) {
        const auto of = [&](int64_t i) { return (pairs - cut + i) / p.heads; };
        const auto task = [&](int64_t i) {
          return Task<F>(p, workspaces.of(i).sample, of(i), (pairs - cut + i) % p.heads);
        };
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < cut * Task<F>::kParts; ++i)
          if (mine(of(i % cut))) task(i % cut).prepare(i / cut, w.work);
        const int64_t blocks = (longest + kKeys - 1) / kKeys;
        for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < cut * blocks;) {
          const Task<F> one = task(i % cut);
          const int64_t first = i / cut * kKeys;
          if (mine(of(i % cut)) && first < one.k.count) one.block(first, w), one.write_block(first, w);
        }
      }
    }
  }
}

}  // namespace

void flash_attention_backward(const Params& p) {
  with_format(p.dtype, [&](auto format) { backward<decltype(format)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
