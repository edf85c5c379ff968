// What moe_dispatch and moe_combine share: slots (the choices of the rows, in order) and their places among the grouped
// rows.
#pragma once

#include "cuda/rows.h"

namespace uvg::cuda {

// places[order[r]] = r.
template <typename Params>
__global__ void places_kernel(Params p) {
  const int64_t r = gpu::block_x() * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (r < p.rows * p.top_k) gpu::store_global(p.places + gpu::load_global(p.order + r), static_cast<int32_t>(r));
}

template <typename Params>
void find_places(const Params& p, gpu::Stream stream) {
  constexpr int kThreads = 256;  // untuned
  gpu::launch(places_kernel<Params>, {gpu::ceil_div(p.rows * p.top_k, kThreads)}, kThreads, 0, stream, p);
}

// body(Tag<T>{}, std::integral_constant<int, kVector>{}) with 16-byte accesses where rows and addresses allow them.
template <typename Params, typename F>
void with_vectors(const Params& p, std::initializer_list<const void*> pointers, F body) {
  with_dtype(p.dtype, [&](auto tag) {
    constexpr int kVector = 16 / sizeof(typename decltype(tag)::Type);
    if (p.width % kVector == 0 && aligned(pointers)) {
      body(tag, std::integral_constant<int, kVector>{});
    } else {
      body(tag, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace uvg::cuda
