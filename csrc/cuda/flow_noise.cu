#include "uvg/flow_noise.h"

#include "cuda/random.h"
#include "cuda/samples.h"

// One launch for both streams: the first blocks corrupt latents, the others tokens.
namespace uvg::cuda {
namespace {

using Params = FlowNoiseParams;

// The normals of one draw; four neighbours of a sample share it.
struct Draw {
  float n0, n1, n2, n3;

  UVG_DEVICE void load(int64_t seed, int64_t step, int64_t quad) {
    const PhiloxWords w = draw(seed, step, kNoise, quad);
    normals(w.w0, w.w1, n0, n1);
    normals(w.w2, w.w3, n2, n3);
  }

  UVG_DEVICE float lane(int64_t place) const {
    const auto lane = static_cast<int>(place % 4);
    return lane < 2 ? (lane == 0 ? n0 : n1) : (lane == 2 ? n2 : n3);
  }
};

template <typename T, int kVector>
UVG_DEVICE void corrupt_latents(const Params& p, int64_t block) {
  const int64_t begin = block * kSampleThreads * kVector, stop = begin + kSampleThreads * kVector;
  const Owner owner(p.latent_spans, p.samples, begin, gpu::min(stop, p.num_latents));
  const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kVector;
  if (first >= p.num_latents) return;
  float clean[kVector], x[kVector], velocity[kVector];
  load_vector(clean, static_cast<const T*>(p.data) + first);
  Draw normals{};
  int64_t known = -1, known_quad = -1, start = 0;
  float sigma = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int64_t sample = owner.of(first + i);
    x[i] = clean[i], velocity[i] = 0.0f;
    if (sample < 0) continue;
    if (sample != known) start = owner.start(sample), sigma = gpu::load_global(p.sigma + sample);
    const int64_t place = first + i - start, quad = place / 4;
    if (sample != known || quad != known_quad) normals.load(gpu::load_global(p.seeds + sample), p.step, quad);
    known = sample, known_quad = quad;
    const float noise = normals.lane(place);
    x[i] = (1.0f - sigma) * clean[i] + sigma * noise;
    velocity[i] = noise - clean[i];
  }
  store_vector(static_cast<T*>(p.x) + first, x);
  store_vector(static_cast<T*>(p.velocity) + first, velocity);
}

UVG_DEVICE void corrupt_tokens(const Params& p, int64_t block) {
  const int64_t begin = block * kSampleThreads;
  const Owner owner(p.token_spans, p.samples, begin, gpu::min(begin + kSampleThreads, p.num_tokens));
  const int64_t i = begin + threadIdx.x;
  if (i >= p.num_tokens) return;
  const int64_t sample = owner.of(i);
  int64_t token = gpu::load_global(p.tokens + i);
  if (sample >= 0) {
    const PhiloxWords w = draw(gpu::load_global(p.seeds + sample), p.step, kSource, i - owner.start(sample));
    const int64_t source = p.mask_id >= 0 ? p.mask_id : philox_integer(w.w1, static_cast<uint32_t>(p.vocab));
    if (!(philox_uniform(w.w0) < gpu::load_global(p.kappa + sample))) token = source;
  }
  gpu::store_global(p.noisy + i, token);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kSampleThreads, 2) noise_kernel(Params p, int64_t latent_blocks) {
  if (gpu::block_x() < latent_blocks) {
    corrupt_latents<T, kVector>(p, gpu::block_x());
  } else {
    corrupt_tokens(p, gpu::block_x() - latent_blocks);
  }
}

}  // namespace

void flow_noise_forward(const Params& p, gpu::Stream stream) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kVector = 16 / sizeof(T);
    const bool wide = p.num_latents % kVector == 0 && aligned({p.data, p.x, p.velocity});
    wide ? launch_streams(noise_kernel<T, kVector>, p, kVector, stream)
         : launch_streams(noise_kernel<T, 1>, p, 1, stream);
  });
}

}  // namespace uvg::cuda
