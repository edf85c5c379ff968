#include "uvg/flow_step.h"

#include "cuda/random.h"
#include "cuda/samples.h"

// One launch for both streams: the first blocks step latents, the others tokens.
namespace uvg::cuda {
namespace {

using Params = FlowStepParams;

constexpr int kCoefs = 10;

// What a sample steps with.
struct Numbers {
  float guidance, c[kCoefs];

  UVG_DEVICE void load(const Params& p, int64_t sample) {
    guidance = gpu::load_global(p.guidance + sample);
#pragma unroll
    for (int k = 0; k < kCoefs; ++k) c[k] = gpu::load_global(p.coefs + sample * kCoefs + k);
  }

  // A coefficient of zero drops its term, NaN included.
  UVG_DEVICE float term(int k, float value) const { return c[k] == 0.0f ? 0.0f : c[k] * value; }
};

template <typename T, int kVector>
UVG_DEVICE void load_or_nan(float (&to)[kVector], const void* from, int64_t first) {
  if (from != nullptr) return load_vector(to, static_cast<const T*>(from) + first);
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = gpu::float_of(0x7FC00000);
}

template <typename T, int kVector>
UVG_DEVICE void step_latents(const Params& p, int64_t block) {
  const int64_t begin = block * kSampleThreads * kVector, stop = begin + kSampleThreads * kVector;
  const Owner owner(p.latent_spans, p.samples, begin, gpu::min(stop, p.num_latents));
  const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kVector;
  if (first >= p.num_latents) return;
  float x[kVector], v[kVector], base[kVector], last[kVector], m1[kVector], m2[kVector];
  load_vector(x, static_cast<const T*>(p.x) + first);
  load_vector(v, static_cast<const T*>(p.v_cond) + first);
  load_or_nan<T>(base, p.v_uncond, first);
  load_or_nan<T>(last, p.last, first);
  load_or_nan<T>(m1, p.m1, first);
  load_or_nan<T>(m2, p.m2, first);
  float next[kVector], corrected[kVector], estimate[kVector];
  Numbers n{};
  int64_t known = -1;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int64_t sample = owner.of(first + i);
    next[i] = corrected[i] = estimate[i] = x[i];
    if (sample < 0) continue;
    if (sample != known) n.load(p, sample);
    known = sample;
    if (p.v_uncond != nullptr && n.guidance != 1.0f) v[i] = base[i] + n.guidance * (v[i] - base[i]);
    const float m = x[i] + n.term(0, v[i]);
    const float xc = n.term(1, x[i]) + n.term(2, last[i]) + n.term(3, m) + n.term(4, m1[i]) + n.term(5, m2[i]);
    next[i] = n.term(6, xc) + n.term(7, m) + n.term(8, m1[i]) + n.term(9, v[i]);
    corrected[i] = xc, estimate[i] = m;
  }
  store_vector(static_cast<T*>(p.x_next) + first, next);
  store_vector(static_cast<T*>(p.corrected) + first, corrected);
  store_vector(static_cast<T*>(p.estimate) + first, estimate);
}

UVG_DEVICE void step_tokens(const Params& p, int64_t block) {
  const int64_t begin = block * kSampleThreads;
  const Owner owner(p.token_spans, p.samples, begin, gpu::min(begin + kSampleThreads, p.num_tokens));
  const int64_t i = begin + threadIdx.x;
  if (i >= p.num_tokens) return;
  const int64_t sample = owner.of(i);
  bool jump = false;
  if (sample >= 0) {
    const int64_t seed = gpu::load_global(p.seeds + sample), step = gpu::load_global(p.steps + sample);
    const float u = philox_uniform(draw(seed, step, kCoin, i - owner.start(sample)).w0);
    jump = u < gpu::load_global(p.jump_prob + sample);
  }
  gpu::store_global(p.tokens_next + i, gpu::load_global((jump ? p.drawn : p.tokens) + i));
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kSampleThreads) step_kernel(Params p, int64_t latent_blocks) {
  if (gpu::block_x() < latent_blocks) {
    step_latents<T, kVector>(p, gpu::block_x());
  } else {
    step_tokens(p, gpu::block_x() - latent_blocks);
  }
}

}  // namespace

void flow_step_forward(const Params& p, gpu::Stream stream) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kVector = 4;  // eight 16-bit elements of six arrays are more than the registers hold on sm_80
    const bool wide = p.num_latents % kVector == 0 &&
                      aligned({p.x, p.v_cond, p.v_uncond, p.last, p.m1, p.m2, p.x_next, p.corrected, p.estimate});
    wide ? launch_streams(step_kernel<T, kVector>, p, kVector, stream)
         : launch_streams(step_kernel<T, 1>, p, 1, stream);
  });
}

}  // namespace uvg::cuda
