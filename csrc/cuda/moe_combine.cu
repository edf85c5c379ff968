#include "uvg/moe_combine.h"

#include "cuda/slots.h"

namespace uvg::cuda {
namespace {

using Params = MoeCombineParams;

// One warp a row, which meets its choices in their order.
template <typename T, int kVector>
__global__ void __launch_bounds__(kSlotThreads, 2) forward_kernel(Params p, int64_t rows_of_block) {
  const BlockRows rows(p.rows, rows_of_block);
  find_places(p, rows);
  for (int64_t row = rows.first + gpu::warp_in_block(); row < rows.last; row += kSlotWarps) {
    lane_columns<kVector>(p.width, [&](int64_t c) {
      float total[kVector] = {};
      for (int64_t slot = row * p.top_k; slot < (row + 1) * p.top_k; ++slot) {
        const int64_t place = gpu::load_global(p.places + slot);
        const float weight = gpu::load_global(p.weights + slot);
        float values[kVector];
        load_vector(values, static_cast<const T*>(p.grouped) + place * p.width + c);
#pragma unroll
        for (int i = 0; i < kVector; ++i) total[i] += weight * values[i];
      }
      store_vector(static_cast<T*>(p.out) + row * p.width + c, total);
    });
  }
}

// One warp a grouped row, which needs no places: no sum runs over rows.
template <typename T, int kVector>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp) backward_kernel(Params p) {
  const int64_t place = row_of_warp();
  if (place >= p.rows * p.top_k) return;
  const int64_t slot = gpu::load_global(p.order + place);
  const T* dout_row = static_cast<const T*>(p.dout) + slot / p.top_k * p.width;
  const float weight = gpu::load_global(p.weights + slot);
  float dot = 0.0f;
  lane_columns<kVector>(p.width, [&](int64_t c) {
    float dout[kVector], values[kVector];
    load_vector(dout, dout_row + c);
    load_vector(values, static_cast<const T*>(p.grouped) + place * p.width + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      dot += dout[i] * values[i];
      dout[i] *= weight;
    }
    store_vector(static_cast<T*>(p.dgrouped) + place * p.width + c, dout);
  });
  dot = gpu::warp_sum(dot);
  if (gpu::lane() == 0) gpu::store_global(p.dweights + slot, dot);
}

}  // namespace

void moe_combine_forward(const Params& p, gpu::Stream stream) {
  with_vectors(p, {p.grouped, p.out}, [&](auto tag, auto vector) {
    launch_slots(forward_kernel<typename decltype(tag)::Type, decltype(vector)::value>, 0, stream, p);
  });
}

void moe_combine_backward(const Params& p, gpu::Stream stream) {
  with_vectors(p, {p.grouped, p.dout, p.dgrouped}, [&](auto tag, auto vector) {
    launch_rows(backward_kernel<typename decltype(tag)::Type, decltype(vector)::value>, p.rows * p.top_k, 0, stream, p);
  });
}

}  // namespace uvg::cuda
