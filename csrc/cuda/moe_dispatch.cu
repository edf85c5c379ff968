#include "uvg/moe_dispatch.h"

#include "cuda/slots.h"

namespace uvg::cuda {
namespace {

using Params = MoeDispatchParams;

constexpr int kSortThreads = 512;  // untuned
constexpr int kSortWarps = kSortThreads / gpu::kWarp;

// The sum over the threads before this one and over all, of whole warps' sums in shared memory.
struct BlockSums {
  int32_t before, all;

  UVG_DEVICE explicit BlockSums(int32_t of_warp) : before(0), all(0) {
    auto* totals = gpu::shared_memory<int32_t>();
    if (gpu::lane() == 0) gpu::store_shared(totals + gpu::warp_in_block(), of_warp);
    gpu::block_barrier();
    for (int w = 0; w < kSortWarps; ++w) {
      const int32_t total = gpu::load_shared(totals + w);
      all += total;
      if (w < gpu::warp_in_block()) before += total;
    }
    gpu::block_barrier();
  }
};

// Block e places the slots of expert e: a stable counting sort, whose order no timing can change.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(Params p) {
  const int64_t expert = gpu::block_x(), slots = p.rows * p.top_k;
  int32_t lower = 0;
  for (int64_t s = threadIdx.x; s < slots; s += kSortThreads) lower += gpu::load_global(p.chosen + s) < expert;
  lower = BlockSums(gpu::warp_sum(lower)).all;
  int32_t next = lower;
  for (int64_t first = 0; first < slots; first += kSortThreads) {
    const int64_t s = first + threadIdx.x;
    const bool mine = s < slots && gpu::load_global(p.chosen + s) == expert;
    const uint32_t votes = gpu::ballot(mine);
    const BlockSums sums(gpu::count_bits(votes));
    if (mine) {
      const int32_t place = next + sums.before + gpu::count_bits(votes & ((1u << gpu::lane()) - 1));
      gpu::store_global(p.places + s, place);
      gpu::store_global(p.order + place, static_cast<int32_t>(s));
    }
    next += sums.all;
  }
  if (threadIdx.x != 0) return;
  gpu::store_global(p.offsets + expert, lower);
  if (expert == p.experts - 1) gpu::store_global(p.offsets + p.experts, next);
}

// One warp a slot.
template <typename T, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp) copy_kernel(Params p) {
  using Chunk = gpu::Pack<T, kVector>;
  const int64_t slot = row_of_warp();
  if (slot >= p.rows * p.top_k) return;
  const int64_t place = gpu::load_global(p.places + slot);
  const T* from = static_cast<const T*>(p.x) + slot / p.top_k * p.width;
  T* to = static_cast<T*>(p.grouped) + place * p.width;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    gpu::store_global(reinterpret_cast<Chunk*>(to + c), gpu::load_global(reinterpret_cast<const Chunk*>(from + c)));
  });
}

// One warp a row: the sum of its copies' gradients, in the order of its choices.
template <typename T, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp) backward_kernel(Params p) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float total[kVector] = {};
    for (int64_t k = 0; k < p.top_k; ++k) {
      const int64_t place = gpu::load_global(p.places + row * p.top_k + k);
      float copy[kVector];
      load_vector(copy, static_cast<const T*>(p.dgrouped) + place * p.width + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i) total[i] += copy[i];
    }
    store_vector(static_cast<T*>(p.dx) + row * p.width + c, total);
  });
}

}  // namespace

void moe_dispatch_forward(const Params& p, gpu::Stream stream) {
  gpu::launch(sort_kernel, {p.experts}, kSortThreads, kSortWarps * sizeof(int32_t), stream, p);
  with_vectors(p, {p.x, p.grouped}, [&](auto tag, auto vector) {
    launch_rows(copy_kernel<typename decltype(tag)::Type, decltype(vector)::value>, p.rows * p.top_k, 0, stream, p);
  });
}

void moe_dispatch_backward(const Params& p, gpu::Stream stream) {
  find_places(p, stream);
  with_vectors(p, {p.dgrouped, p.dx}, [&](auto tag, auto vector) {
    launch_rows(backward_kernel<typename decltype(tag)::Type, decltype(vector)::value>, p.rows, 0, stream, p);
  });
}

}  // namespace uvg::cuda
