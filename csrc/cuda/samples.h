// Kernels over elements of packed samples: kThreads threads a block, kVector neighbours a thread. A span is (start,
// len).
#pragma once

#include "cuda/rows.h"

namespace uvg::cuda {

constexpr int kSampleThreads = 256;  // untuned

inline int64_t sample_blocks(int64_t count, int vector) {
  return gpu::ceil_div(count, int64_t{kSampleThreads} * vector);
}

// Which sample has an element. Most blocks lie inside one sample; the others look for each element.
class Owner {
 public:
  // Elements [first, end) of the block; the whole warp calls it.
  UVG_DEVICE Owner(const int32_t* spans, int64_t samples, int64_t first, int64_t end)
      : spans_(spans), samples_(samples), only_(span_of_row(spans, samples, 2, first)) {
    if (only_ >= 0 && end > start(only_) + gpu::load_global(spans_ + 2 * only_ + 1)) only_ = -1;
  }

  // The sample of element i, -1 where no span covers it.
  UVG_DEVICE int64_t of(int64_t i) const { return only_ >= 0 ? only_ : span_of_row_alone(spans_, samples_, 2, i); }

  UVG_DEVICE int64_t start(int64_t sample) const { return gpu::load_global(spans_ + 2 * sample); }

 private:
  const int32_t* spans_;
  int64_t samples_, only_;
};

// Runs kernel(params, latent_blocks): blocks for all latents, `vector` a thread, then blocks for all tokens.
template <typename Params>
void launch_streams(void (*kernel)(Params, int64_t), const Params& p, int vector, gpu::Stream stream) {
  const int64_t latent_blocks = sample_blocks(p.num_latents, vector);
  gpu::launch(kernel, {latent_blocks + sample_blocks(p.num_tokens, 1)}, kSampleThreads, 0, stream, p, latent_blocks);
}

}  // namespace uvg::cuda
