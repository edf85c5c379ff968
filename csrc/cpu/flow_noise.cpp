#include "uvg/flow_noise.h"

#include "common/row_chunks.h"
#include "common/threads.h"
#include "cpu/random.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = FlowNoiseParams;

static_assert(kAloneNoiseValues % kNormals == 0, "a chunk begins where the normals of a call begin");

template <typename T>
void latents(const Params& p) {
  const RowChunks chunks(p.latent_spans, p.samples, 2, p.num_latents, kAloneNoiseValues);
  const T* data = static_cast<const T*>(p.data);
  T *x = static_cast<T*>(p.x), *velocity = static_cast<T*>(p.velocity);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.num_latents > kAloneNoiseValues)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const RowChunk chunk = chunks[c];
    if (chunk.span < 0) {
      std::memcpy(x + chunk.first, data + chunk.first, static_cast<size_t>(chunk.rows) * sizeof(T));
      std::memset(velocity + chunk.first, 0, static_cast<size_t>(chunk.rows) * sizeof(T));
      continue;
    }
    const float sigma = p.sigma[chunk.span];
    const RoundKeys keys(p.seeds[chunk.span]);
    for (int64_t block = 0; block < chunk.rows; block += kNormals) {
      float noise[kNormals];
      normals(keys, p.step, (chunk.offset + block) / 4, noise);
      const int64_t rest = chunk.rows - block, first = chunk.first + block;
      columns(rest < kNormals ? rest : kNormals, [&](int64_t i, int64_t n) {
        const Vec clean = load(data + first + i, n), drawn = load(noise + i);
        store(x + first + i, (1.0f - sigma) * clean + sigma * drawn, n);
        store(velocity + first + i, drawn - clean, n);
      });
    }
  }
}

void tokens(const Params& p) {
  const RowChunks chunks(p.token_spans, p.samples, 2, p.num_tokens);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.num_tokens > kAloneNoiseValues)
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const RowChunk chunk = chunks[c];
    const int64_t* clean = p.tokens + chunk.first;
    int64_t* noisy = p.noisy + chunk.first;
    if (chunk.span < 0) {
      std::memcpy(noisy, clean, static_cast<size_t>(chunk.rows) * sizeof *noisy);
      continue;
    }
    columns(chunk.rows, [&](int64_t i, int64_t n) {
      const Words words = philox(p.seeds[chunk.span], p.step, kSource, chunk.offset + i);
      const VecInts kept = uniform(words.w[0]) < p.kappa[chunk.span];
      const VecBits source = integers(words.w[1], static_cast<uint32_t>(p.vocab));
      for (int64_t t = 0; t < n; ++t)
        noisy[i + t] = kept[t] ? clean[i + t] : p.mask_id >= 0 ? p.mask_id : int64_t{source[t]};
    });
  }
}

}  // namespace

void flow_noise_forward(const Params& p) {
  with_type(p.dtype, [&](auto type) { latents<decltype(type)>(p); });
  tokens(p);
}

}  // namespace UVG_ISA
}  // namespace uvg
