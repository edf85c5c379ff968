// How attention is cut into tasks, each of which reads its keys packed or as they lie.
#pragma once

#include "cpu/attention_few.h"

namespace uvg {
namespace UVG_ISA {

constexpr int64_t kLeastRows = 24;  // of a task

template <typename T>
void without_keys(const Params& p, int64_t list) {
  for (int64_t i = 0; i < p.queries->size(list); ++i) {
    const int64_t row = p.queries->rows(list)[i], size = p.heads * p.width;
    std::memset(static_cast<T*>(p.out) + row * size, 0, static_cast<size_t>(size) * sizeof(T));
    for (int64_t head = 0; p.lse != nullptr && head < p.heads; ++head) p.lse[head * p.rows_q + row] = kNever;
  }
}

// Whether keys and values of a sample are read as they lie.
template <typename S>
bool lies(const Params& p, int64_t s) {
  return S::kLies && p.queries->size(s) <= kFew && p.width % kLanes == 0;
}

// Sample, head and part of the queries of a task: whole samples where there are enough of them for the threads, each
// with its keys packed on the way. Else samples are cut, where there are few rows into tasks of less than a block, and
// their keys are packed before. Cutting changes no bit.
template <typename S>
void attention(const Params& p) {
  using T = typename S::Format::Value;
  const int64_t samples = p.queries->samples(), pairs = samples * p.heads;
  without_keys<T>(p, samples);
  int64_t products = 0;
  bool packs = false;
  for (int64_t s = 0; s < samples; ++s) {
    if (p.keys->size(s) == 0) without_keys<T>(p, s);
    products += p.queries->size(s) * p.keys->size(s) * p.heads * p.width;
    packs = packs || (p.keys->size(s) != 0 && !lies<S>(p, s));
  }
  const int threads = threads_for_products(p.threads, 2 * products);
  const int64_t parts = threads > 1 && pairs < 4 * threads && pairs > 0 ? (4 * threads + pairs - 1) / pairs : 1;
  const int64_t longest = p.queries->longest(), share = (longest + parts - 1) / parts;
  const int64_t part =
      share < kQueries ? round_up(share > kLeastRows ? share : kLeastRows, kTileRows) : round_up(share, kQueries);
  const int64_t most = round_up(longest < part ? longest : part, kTileRows);
  Scratch scratch;
  const Packed<S> shared(scratch, p, packs && parts > 1 ? pairs : 0);
  const PerThread<Workspace<S>> workspaces(scratch, threads, p, packs && parts == 1 ? 1 : 0,
                                           most < kQueries ? most : kQueries);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Workspace<S>& w = workspaces.own();
    if (packs && parts > 1) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < 2 * pairs; ++i) {
        const int64_t s = i / 2 / p.heads;
        if (lies<S>(p, s)) continue;
        const auto pack = i % 2 == 0 ? pack_keys<S> : pack_values<S>;
        pack(p, s, i / 2 % p.heads, shared.slot(i / 2), w.work);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs * parts; ++task) {
      const int64_t pair = task % pairs, s = pair / p.heads, head = pair % p.heads, first = task / pairs * part;
      const int64_t end = first + part, all = p.queries->size(s), last = end < all ? end : all;
      const int64_t num_keys = p.keys->size(s);
      if (num_keys == 0 || first >= last) continue;
      const Rows<T> queries = rows_of<T>(p, p.q, head, *p.queries, s);
      if constexpr (S::kLies) {
        if (lies<S>(p, s)) {
          const Rows<T> keys = rows_of<T>(p, p.k, head, *p.keys, s), values = rows_of<T>(p, p.v, head, *p.keys, s);
          attend<S>(p, queries, head, num_keys, LyingKeys<S>(keys, values, p.width, w.work), w);
          continue;
        }
      }
      if (parts == 1) pack_keys<S>(p, s, head, w.packed, w.work), pack_values<S>(p, s, head, w.packed, w.work);
      const PackedKeys<S> packed(parts > 1 ? shared.slot(pair) : w.packed, p.width, num_keys);
      for (int64_t q = first; q < last; q += kQueries)
        attend<S>(p, queries.from(q, last - q < kQueries ? last - q : kQueries), head, num_keys, packed, w);
    }
  }
}

}  // namespace UVG_ISA
}  // namespace uvg
