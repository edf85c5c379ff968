// Gradients of attention of a few queries: keys and values are read once as they lie, all heads of a row together, and
// their gradients written once. No product is large enough to be worth a packed operand.
#pragma once

#include "cpu/rows.h"
#include "cpu/tile.h"
#include "uvg/flash_attention.h"

namespace uvg {
namespace UVG_ISA {

constexpr int64_t kFewQueries = 8;  // of a sample at the most (fp32 and AVX2: AGENTS.md; else untuned)
constexpr int kFewKeys = 4;         // whose sums run side by side

// What a thread works in: [queries, heads, round_up(width, kLanes)] and [queries, heads].
struct FewRoom {
  float *dq, *lse, *delta;

  FewRoom(Scratch& scratch, const FlashAttentionParams& p)
      : dq(scratch.floats(kFewQueries * p.heads * round_up(p.width, kLanes))),
        lse(scratch.floats(kFewQueries * p.heads)),
        delta(scratch.floats(kFewQueries * p.heads)) {}
};

// As `columns`, all of it in the loop of the caller, so that what it reads stays in registers.
template <typename Body>
UVG_INLINE void along(int64_t width, Body&& body) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) body(c, kLanes);
  if (c < width) body(c, width - c);
}

// out[i] = x . rows[i]
template <int64_t kCount, typename T>
UVG_NOINLINE void dots(const T* x, const T* const* rows, int64_t width, float* out) {
  const T* row[kCount];
  Vec sums[kCount] = {};
  each<kCount>([&](auto i) UVG_INLINED { row[i] = rows[i]; });
  along(width, [&](int64_t c, int64_t n) UVG_INLINED {
    const Vec value = load(x + c, n);
    each<kCount>([&](auto i) UVG_INLINED { sums[i] = multiply_add(value, load(row[i] + c, n), sums[i]); });
  });
  each<kCount>([&](auto i) UVG_INLINED { out[i] = sum(sums[i]); });
}

// out, of whole vectors, += factors[i] * rows[i], one after the other.
template <int64_t kCount, typename T>
UVG_NOINLINE void add_rows(const float* factors, const T* const* rows, int64_t width, float* out) {
  const T* row[kCount];
  float factor[kCount];
  each<kCount>([&](auto i) UVG_INLINED { row[i] = rows[i], factor[i] = factors[i]; });
  along(width, [&](int64_t c, int64_t n) UVG_INLINED {
    Vec total = load(out + c);
    each<kCount>([&](auto i) UVG_INLINED { total = multiply_add(splat(factor[i]), load(row[i] + c, n), total); });
    store(out + c, total);
  });
}

// out = scale * the sum of factors[i][key] * rows[i]; or, if it is floats that are added to, without the scale.
template <int64_t kCount, bool kAdds, typename T>
UVG_NOINLINE void put_sum(const float (*factors)[kLanes], int64_t key, const T* const* rows, int64_t width, float scale,
                          void* out) {
  const T* row[kCount];
  float factor[kCount];
  each<kCount>([&](auto i) UVG_INLINED { row[i] = rows[i], factor[i] = factors[i][key]; });
  along(width, [&](int64_t c, int64_t n) UVG_INLINED {
    Vec total = load(row[0] + c, n) * factor[0];
    each<kCount - 1>([&](auto i)
                         UVG_INLINED { total = multiply_add(splat(factor[i + 1]), load(row[i + 1] + c, n), total); });
    if constexpr (kAdds)
      add_to(static_cast<float*>(out) + c, total, n);
    else
      store(static_cast<T*>(out) + c, total * scale, n);
  });
}

// body(first, Count<kFewKeys> or Count<1>) over `count` keys.
template <typename Body>
UVG_INLINE void by_keys(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kFewKeys <= count; i += kFewKeys) body(i, Count<kFewKeys>{});
  for (; i < count; ++i) body(i, Count<1>{});
}

template <typename F>
class Few {
 public:
  using T = typename F::Value;

  // Heads from `first` on. Of one head, gradients of keys and values may be added to sums [2, rows_k, columns].
  Few(const FlashAttentionParams& params, int64_t s, int64_t first, int64_t count, const FewRoom& own,
      float* sums_of_head = nullptr)
      : p(params),
        room(own),
        query_rows(p.queries->rows(s)),
        key_rows(p.keys->rows(s)),
        queries(p.queries->size(s)),
        keys(p.keys->size(s)),
        begin(first),
        end(first + count),
        sums(sums_of_head) {}

  void run() const {
    const int64_t padded = round_up(p.width, kLanes);
    for (int64_t r = 0; r < queries; ++r)
      for (int64_t head = begin; head < end; ++head) start(r, head);
    for (int64_t k = 0; k < keys; k += kLanes)
      for (int64_t head = begin; head < end; ++head) block(k, keys - k < kLanes ? keys - k : kLanes, head);
    for (int64_t r = 0; r < queries; ++r)
      for (int64_t head = begin; head < end; ++head) {
        T* to = at<T>(p.dq, query_rows[r], head);
        const float* from = room.dq + (r * p.heads + head) * padded;
        columns(p.width, [&](int64_t c, int64_t n) { store(to + c, load(from + c) * p.scale, n); });
      }
  }

 private:
  template <bool kAdds>
  static constexpr decltype(&put_sum<1, kAdds, T>) kPutSums[kFewQueries] = {
      put_sum<1, kAdds, T>, put_sum<2, kAdds, T>, put_sum<3, kAdds, T>, put_sum<4, kAdds, T>,
      put_sum<5, kAdds, T>, put_sum<6, kAdds, T>, put_sum<7, kAdds, T>, put_sum<8, kAdds, T>};

  template <typename X, typename Tensor>
  X* at(Tensor* x, int64_t row, int64_t head) const {
    return static_cast<X*>(x) + (row * p.heads + head) * p.width;
  }

  void start(int64_t r, int64_t head) const {
    const int64_t row = query_rows[r], i = r * p.heads + head, padded = round_up(p.width, kLanes);
    const T *out = at<const T>(p.out, row, head), *dout = at<const T>(p.dout, row, head);
    Vec dot = {};
    columns(p.width, [&](int64_t c, int64_t n) { dot += load(out + c, n) * load(dout + c, n); });
    room.delta[i] = sum(dot), room.lse[i] = p.lse[head * p.rows_q + row] / F::kUnit;
    std::memset(room.dq + i * padded, 0, static_cast<size_t>(padded) * sizeof(float));
  }

  // `count` keys from k on, of one head.
  UVG_NOINLINE void block(int64_t k, int64_t count, int64_t head) const {
    const T *key[kLanes], *value[kLanes], *query[kFewQueries], *dout[kFewQueries];
    float probabilities[kFewQueries][kLanes], scores[kFewQueries][kLanes];  // scores: their gradients
    for (int64_t i = 0; i < count; ++i) {
      key[i] = at<const T>(p.k, key_rows[k + i], head), value[i] = at<const T>(p.v, key_rows[k + i], head);
    }
    for (int64_t r = 0; r < queries; ++r) {
      query[r] = at<const T>(p.q, query_rows[r], head), dout[r] = at<const T>(p.dout, query_rows[r], head);
      const int64_t at_row = r * p.heads + head;
      float score[kLanes] = {}, gradient[kLanes] = {};
      by_keys(count, [&](int64_t i, auto together) {
        dots<together.value>(query[r], key + i, p.width, score + i);
        dots<together.value>(dout[r], value + i, p.width, gradient + i);
      });
      const Vec share = F::power(load(score) * (p.scale / F::kUnit) - room.lse[at_row]);
      store(probabilities[r], share), store(scores[r], share * (load(gradient) - room.delta[at_row]));
      float* dq = room.dq + at_row * round_up(p.width, kLanes);
      by_keys(count, [&](int64_t i, auto together) { add_rows<together.value>(scores[r] + i, key + i, p.width, dq); });
    }
    const auto put = sums == nullptr ? kPutSums<false>[queries - 1] : kPutSums<true>[queries - 1];
    const int64_t columns = round_up(p.width, kLanes);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = key_rows[k + i];
      void *dk = at<T>(p.dk, row, head), *dv = at<T>(p.dv, row, head);
      if (sums != nullptr) dk = sums + row * columns, dv = sums + (p.rows_k + row) * columns;
      put(scores, i, query, p.width, p.scale, dk);
      put(probabilities, i, dout, p.width, 1.0f, dv);
    }
  }

  const FlashAttentionParams& p;
  const FewRoom& room;
  const int32_t *query_rows, *key_rows;
  const int64_t queries, keys, begin, end;
  float* const sums;
};

}  // namespace UVG_ISA
}  // namespace uvg
