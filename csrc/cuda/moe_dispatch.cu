#include "uvg/moe_dispatch.h"

#include "cuda/slots.h"

namespace uvg::cuda {
namespace {

using Params = MoeDispatchParams;

constexpr int kWindow = 1024;  // experts whose slots are counted at a time
constexpr size_t kSortShared = 2 * kWindow * sizeof(int32_t);

// A stable counting sort of which each block places the slots of its own rows: it counts all slots by expert, those
// before its own and those from there on, and goes through its own in their order. Integer sums by atomics: any order
// of them gives the same.
class Sort {
 public:
  UVG_DEVICE Sort(const Params& p, const BlockRows& rows)
      : p_(p),
        begin_(rows.first * p.top_k),
        end_(rows.last * p.top_k),
        before_(gpu::shared_memory<int32_t>()),
        rest_(before_ + kWindow) {}

  // Places the slots of the experts from `first` on, `lower` slots having lower ones; returns how many have lower ones
  // than the next window. Every thread calls it, the first warp's answer counts.
  UVG_DEVICE int32_t place(int64_t first, int32_t lower) const {
    for (int i = threadIdx.x; i < 2 * kWindow; i += kSlotThreads) gpu::store_shared(before_ + i, 0);
    gpu::block_barrier();
    each_of_table(p_.chosen, p_.rows * p_.top_k, [&](int64_t s, int32_t expert) {
      const bool counts = s < p_.rows * p_.top_k && in_window(expert, first);
      const int entry = counts ? static_cast<int>(expert - first) + (s < begin_ ? 0 : kWindow) : -1;
      const uint32_t same = gpu::lanes_with(entry);
      if (counts && (same & lanes_before()) == 0) gpu::atomic_add_shared(before_ + entry, gpu::count_bits(same));
    });
    gpu::block_barrier();
    if (gpu::warp_in_block() == 0) {
      lower = make_starts(first, lower);
      gpu::warp_barrier();
      place_own(first);
    }
    gpu::block_barrier();
    return lower;
  }

 private:
  static UVG_DEVICE bool in_window(int32_t expert, int64_t first) {
    return expert >= first && expert < first + kWindow;
  }
  static UVG_DEVICE uint32_t lanes_before() { return (1u << gpu::lane()) - 1; }

  // before_[e] becomes the place of the block's first slot of expert e. One warp.
  UVG_DEVICE int32_t make_starts(int64_t first, int32_t lower) const {
    const int64_t count = gpu::min(kWindow, p_.experts - first);
    for (int64_t e = gpu::lane(); e - gpu::lane() < count; e += gpu::kWarp) {
      const int32_t before = gpu::load_shared(before_ + e), all = before + gpu::load_shared(rest_ + e);
      const int32_t upto = gpu::warp_sum_upto(all), start = lower + upto - all;
      gpu::store_shared(before_ + e, start + before);
      if (e < count && gpu::block_x() == 0) gpu::store_global(p_.offsets + first + e, start);
      lower += gpu::shuffle_from(upto, gpu::kWarp - 1);
    }
    return lower;
  }

  // The block's slots of the window, 32 at a time. One warp.
  UVG_DEVICE void place_own(int64_t first) const {
    for (int64_t s = begin_ + gpu::lane(); s - gpu::lane() < end_; s += gpu::kWarp) {
      const int32_t expert = s < end_ ? gpu::load_global(p_.chosen + s) : -1;
      const bool mine = in_window(expert, first);
      const uint32_t same = gpu::lanes_with(mine ? expert : -1);
      int32_t* next = before_ + (mine ? expert - first : 0);
      const int32_t start = gpu::load_shared(next), place = start + gpu::count_bits(same & lanes_before());
      gpu::warp_barrier();
      if (mine && (same & lanes_before()) == 0) gpu::store_shared(next, start + gpu::count_bits(same));
      gpu::warp_barrier();
      if (!mine) continue;
      gpu::store_global(p_.places + s, place);
      gpu::store_global(p_.order + place, static_cast<int32_t>(s));
    }
  }

  const Params& p_;
  int64_t begin_, end_;  // the block's slots
  int32_t *before_, *rest_;
};

// Each row is read once and written to all its places, by one warp.
template <typename T, int kVector>
__global__ void __launch_bounds__(kSlotThreads, 2) forward_kernel(Params p, int64_t rows_of_block) {
  using Chunk = gpu::Pack<T, kVector>;
  const BlockRows rows(p.rows, rows_of_block);
  int32_t lower = 0;
  for (int64_t first = 0; first < p.experts; first += kWindow) lower = Sort(p, rows).place(first, lower);
  if (gpu::block_x() == 0 && threadIdx.x == 0) gpu::store_global(p.offsets + p.experts, lower);
  for (int64_t row = rows.first + gpu::warp_in_block(); row < rows.last; row += kSlotWarps) {
    const T* from = static_cast<const T*>(p.x) + row * p.width;
    lane_columns<kVector>(p.width, [&](int64_t c) {
      const Chunk chunk = gpu::load_global(reinterpret_cast<const Chunk*>(from + c));
      for (int64_t k = 0; k < p.top_k; ++k) {
        const int64_t place = gpu::load_global(p.places + row * p.top_k + k);
        gpu::store_global(reinterpret_cast<Chunk*>(static_cast<T*>(p.grouped) + place * p.width + c), chunk);
      }
    });
  }
}

// One warp a row: the sum of its copies' gradients, in the order of its choices.
template <typename T, int kVector>
__global__ void __launch_bounds__(kSlotThreads, 2) backward_kernel(Params p, int64_t rows_of_block) {
  const BlockRows rows(p.rows, rows_of_block);
  find_places(p, rows);
  for (int64_t row = rows.first + gpu::warp_in_block(); row < rows.last; row += kSlotWarps) {
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
}

}  // namespace

void moe_dispatch_forward(const Params& p, gpu::Stream stream) {
  with_vectors(p, {p.x, p.grouped}, [&](auto tag, auto vector) {
    launch_slots(forward_kernel<typename decltype(tag)::Type, decltype(vector)::value>, kSortShared, stream, p);
  });
}

void moe_dispatch_backward(const Params& p, gpu::Stream stream) {
  with_vectors(p, {p.dgrouped, p.dx}, [&](auto tag, auto vector) {
    launch_slots(backward_kernel<typename decltype(tag)::Type, decltype(vector)::value>, 0, stream, p);
  });
}

}  // namespace uvg::cuda
