#include "uvg/moe_route.h"

#include "cuda/rows.h"

// One warp a row, which goes through the row's logits once for every choice.
namespace uvg::cuda {
namespace {

using Params = MoeRouteParams;

constexpr uint32_t kLowest = 0x7FFFFFFF;

// A logit and its expert as one number to compare: the larger logit first, NaN before all, ties to the lower index.
UVG_DEVICE uint64_t rank_of(float logit, int64_t expert) {
  const uint32_t bits = logit == 0.0f ? 0 : gpu::bits_of(logit);  // -0 ties with 0
  const uint32_t ordered = logit != logit ? 0xFFFFFFFFu : bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | (kLowest - static_cast<uint32_t>(expert));
}

UVG_DEVICE float logit_of(uint64_t rank) {
  const auto ordered = static_cast<uint32_t>(rank >> 32);
  return gpu::float_of(ordered >> 31 != 0 ? ordered & 0x7FFFFFFF : ~ordered);
}

UVG_DEVICE int32_t expert_of(uint64_t rank) { return static_cast<int32_t>(kLowest - static_cast<uint32_t>(rank)); }

template <typename T>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp) forward_kernel(Params p) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const T* logits = static_cast<const T*>(p.logits) + row * p.experts;
  float* weights = p.weights + row * p.top_k;
  uint64_t last = ~uint64_t{0};
  float most = 0.0f, total = 0.0f;
  for (int64_t k = 0; k < p.top_k; ++k) {
    uint64_t best = 0;
    for (int64_t e = gpu::lane(); e < p.experts; e += gpu::kWarp) {
      const uint64_t rank = rank_of(gpu::to_float(gpu::load_global(logits + e)), e);
      if (rank < last && rank > best) best = rank;
    }
    last = gpu::warp_max(best);
    const float logit = logit_of(last);
    if (k == 0) most = logit;
    if (k % gpu::kWarp == gpu::lane()) {
      const float share = gpu::exp(logit - most);
      total += share;
      gpu::store_global(weights + k, share);
      gpu::store_global(p.chosen + row * p.top_k + k, expert_of(last));
    }
  }
  total = gpu::warp_sum(total);
  for (int64_t k = gpu::lane(); k < p.top_k; k += gpu::kWarp)  // each lane its own
    gpu::store_global(weights + k, gpu::load_global(weights + k) / total);
}

template <typename T>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp) backward_kernel(Params p) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const float *weights = p.weights + row * p.top_k, *dweights = p.dweights + row * p.top_k;
  const int32_t* chosen = p.chosen + row * p.top_k;
  float mean = 0.0f;
  for (int64_t k = gpu::lane(); k < p.top_k; k += gpu::kWarp)
    mean += gpu::load_global(weights + k) * gpu::load_global(dweights + k);
  mean = gpu::warp_sum(mean);
  for (int64_t e = gpu::lane(); e < p.experts; e += gpu::kWarp) {
    float dlogit = 0.0f;
    for (int64_t k = 0; k < p.top_k; ++k) {
      if (gpu::load_global(chosen + k) == e)
        dlogit = gpu::load_global(weights + k) * (gpu::load_global(dweights + k) - mean);
    }
    gpu::store_global(static_cast<T*>(p.dlogits) + row * p.experts + e, gpu::from_float<T>(dlogit));
  }
}

}  // namespace

void moe_route_forward(const Params& p, gpu::Stream stream) {
  with_dtype(p.dtype,
             [&](auto tag) { launch_rows(forward_kernel<typename decltype(tag)::Type>, p.rows, 0, stream, p); });
}

void moe_route_backward(const Params& p, gpu::Stream stream) {
  with_dtype(p.dtype,
             [&](auto tag) { launch_rows(backward_kernel<typename decltype(tag)::Type>, p.rows, 0, stream, p); });
}

}  // namespace uvg::cuda
