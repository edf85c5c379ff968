#include "uvg/flow_step.h"

#include "common/row_chunks.h"
#include "common/threads.h"
#include "cpu/random.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = FlowStepParams;

constexpr int64_t kCoefs = 10;
constexpr int64_t kVecs = 4;  // under one look at the coefficients

// Adds factor * values, nothing where the factor is 0: values in memory are not read then, they may not be there.
template <int64_t kCount>
UVG_INLINE void add(Vec (&sum)[kCount], float factor, const Vec (&values)[kCount]) {
  if (factor != 0.0f) each<kCount>([&](auto k) UVG_INLINED { sum[k] += factor * values[k]; });
}

template <int64_t kCount, typename T>
UVG_INLINE void add(Vec (&sum)[kCount], float factor, const T* values, int64_t i, int64_t n) {
  if (factor != 0.0f) each<kCount>([&](auto k) UVG_INLINED { sum[k] += factor * load(values + i + k * kLanes, n); });
}

// What a span's values are computed with.
template <typename T>
struct Step {
  const T *x, *v_cond, *v_uncond, *last, *m1, *m2;  // v_uncond: null where there is no guidance
  T *x_next, *corrected, *estimate;
  float coefs[kCoefs], guidance;

  Step(const Params& p, int64_t span)
      : x(static_cast<const T*>(p.x)),
        v_cond(static_cast<const T*>(p.v_cond)),
        v_uncond(p.guidance[span] == 1.0f ? nullptr : static_cast<const T*>(p.v_uncond)),
        last(static_cast<const T*>(p.last)),
        m1(static_cast<const T*>(p.m1)),
        m2(static_cast<const T*>(p.m2)),
        x_next(static_cast<T*>(p.x_next)),
        corrected(static_cast<T*>(p.corrected)),
        estimate(static_cast<T*>(p.estimate)),
        guidance(p.guidance[span]) {
    std::memcpy(coefs, p.coefs + span * kCoefs, sizeof coefs);
  }

  // kCount vectors from value i on, the last of n values.
  template <int64_t kCount>
  UVG_INLINE void run(int64_t i, int64_t n) const {
    const float* c = coefs;
    Vec v[kCount], now[kCount], m[kCount], fixed[kCount] = {}, next[kCount] = {};
    each<kCount>([&](auto k) UVG_INLINED {
      const int64_t at = i + k * kLanes;
      now[k] = m[k] = load(x + at, n);
      v[k] = load(v_cond + at, n);
      if (v_uncond == nullptr) return;
      const Vec base = load(v_uncond + at, n);
      v[k] = base + guidance * (v[k] - base);
    });
    add(m, c[0], v);
    add(fixed, c[1], now), add(fixed, c[2], last, i, n), add(fixed, c[3], m);
    add(fixed, c[4], m1, i, n), add(fixed, c[5], m2, i, n);
    add(next, c[6], fixed), add(next, c[7], m), add(next, c[8], m1, i, n), add(next, c[9], v);
    each<kCount>([&](auto k) UVG_INLINED {
      store(estimate + i + k * kLanes, m[k], n);
      store(corrected + i + k * kLanes, fixed[k], n);
      store(x_next + i + k * kLanes, next[k], n);
    });
  }
};

template <typename T>
void latents(const Params& p) {
  const RowChunks chunks(p.latent_spans, p.samples, 2, p.num_latents, kAloneStepValues);
  const auto from = [](const void* base) { return static_cast<const T*>(base); };
  const auto to = [](void* base) { return static_cast<T*>(base); };
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.num_latents > kAloneStepValues)
  for (int64_t b = 0; b < chunks.size(); ++b) {
    const RowChunk chunk = chunks[b];
    if (chunk.span < 0) {
      const size_t size = static_cast<size_t>(chunk.rows) * sizeof(T);
      for (void* out : {p.x_next, p.corrected, p.estimate})
        std::memcpy(to(out) + chunk.first, from(p.x) + chunk.first, size);
      continue;
    }
    const Step<T> step(p, chunk.span);
    int64_t i = chunk.first;
    const int64_t end = i + chunk.rows;
    for (; i + kVecs * kLanes <= end; i += kVecs * kLanes) step.template run<kVecs>(i, kLanes);
    for (; i < end; i += kLanes) step.template run<1>(i, end - i < kLanes ? end - i : kLanes);
  }
}

void tokens(const Params& p) {
  const RowChunks chunks(p.token_spans, p.samples, 2, p.num_tokens);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.num_tokens > kAloneStepValues)
  for (int64_t b = 0; b < chunks.size(); ++b) {
    const RowChunk chunk = chunks[b];
    const int64_t *now = p.tokens + chunk.first, *drawn = p.drawn + chunk.first;
    int64_t* next = p.tokens_next + chunk.first;
    const float prob = chunk.span < 0 ? 0.0f : p.jump_prob[chunk.span];
    if (!(prob > 0.0f)) {  // no uniform is below it
      std::memcpy(next, now, static_cast<size_t>(chunk.rows) * sizeof *next);
      continue;
    }
    columns(chunk.rows, [&](int64_t i, int64_t n) {
      const Words words = philox(p.seeds[chunk.span], p.steps[chunk.span], kCoin, chunk.offset + i);
      const VecInts jumps = uniform(words.w[0]) < prob;
      for (int64_t t = 0; t < n; ++t) next[i + t] = jumps[t] ? drawn[i + t] : now[i + t];
    });
  }
}

}  // namespace

void flow_step_forward(const Params& p) {
  with_type(p.dtype, [&](auto type) { latents<decltype(type)>(p); });
  tokens(p);
}

}  // namespace UVG_ISA
}  // namespace uvg
