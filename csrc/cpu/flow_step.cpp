#include "uvg/flow_step.h"

#include "common/row_chunks.h"
#include "common/threads.h"
#include "cpu/random.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = FlowStepParams;

constexpr int64_t kCoefs = 10;

// factor * value, nothing where the factor is 0. `value` is not asked for then: it may not be there.
template <typename Value>
inline Vec term(float factor, Value&& value) {
  return factor == 0.0f ? Vec{} : factor * value();
}

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
    float c[kCoefs];  // a copy, which no store can change
    std::memcpy(c, p.coefs + chunk.span * kCoefs, sizeof c);
    const float guidance = p.guidance[chunk.span];
    const bool guided = p.v_uncond != nullptr && guidance != 1.0f;
    columns(chunk.rows, [&](int64_t i, int64_t n) {
      const auto at = [&](const void* base) { return [=, &chunk] { return load(from(base) + chunk.first + i, n); }; };
      const Vec x = at(p.x)();
      Vec v = at(p.v_cond)();
      if (guided) {
        const Vec base = at(p.v_uncond)();
        v = base + guidance * (v - base);
      }
      const Vec m = x + term(c[0], [&] { return v; });
      const Vec corrected = term(c[1], [&] { return x; }) + term(c[2], at(p.last)) + term(c[3], [&] { return m; }) +
                            term(c[4], at(p.m1)) + term(c[5], at(p.m2));
      const Vec next = term(c[6], [&] { return corrected; }) + term(c[7], [&] { return m; }) + term(c[8], at(p.m1)) +
                       term(c[9], [&] { return v; });
      store(to(p.estimate) + chunk.first + i, m, n);
      store(to(p.corrected) + chunk.first + i, corrected, n);
      store(to(p.x_next) + chunk.first + i, next, n);
    });
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
  p.dtype == Dtype::kFloat32 ? latents<float>(p) : latents<BFloat16>(p);
  tokens(p);
}

}  // namespace UVG_ISA
}  // namespace uvg
