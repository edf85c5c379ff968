#include "uvg/moe_combine.h"

#include "common/threads.h"
#include "cpu/stream.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = MoeCombineParams;

void find_places(const Params& p) {
  for (int64_t r = 0; r < p.rows * p.top_k; ++r) p.places[p.order[r]] = static_cast<int32_t>(r);
}

template <typename T>
void forward(const Params& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > kAloneMoeValues)
  for (int64_t t = 0; t < p.rows; ++t) {
    const int32_t* places = p.places + t * p.top_k;
    const float* weights = p.weights + t * p.top_k;
    T* out = static_cast<T*>(p.out) + t * p.width;
    columns(p.width, [&](int64_t i, int64_t n) {
      Vec total = {};
      for (int64_t k = 0; k < p.top_k; ++k)
        total += weights[k] * load(static_cast<const T*>(p.grouped) + places[k] * p.width + i, n);
      store(out + i, total, n);
    });
  }
}

template <typename T>
void backward(const Params& p) {
  const Target<T> dgrouped(p.dgrouped, p.rows * p.top_k, p.width);
#pragma omp parallel num_threads(p.threads) if (p.rows * p.width > kAloneMoeValues)
  {
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < p.rows; ++t) {
      const T* dout = static_cast<const T*>(p.dout) + t * p.width;
      for (int64_t k = 0; k < p.top_k; ++k) {
        const int64_t slot = t * p.top_k + k, place = p.places[slot];
        const T* grouped = static_cast<const T*>(p.grouped) + place * p.width;
        const float weight = p.weights[slot];
        p.dweights[slot] = sum_row(p.width, [&](int64_t i, int64_t n) UVG_INLINED {
          const Vec gradient = load(dout + i, n);
          dgrouped.put(place, i, weight * gradient, n);
          return gradient * load(grouped + i, n);
        });
      }
    }
    dgrouped.finish();
  }
}

}  // namespace

void moe_combine_forward(const Params& p) {
  find_places(p);
  with_type(p.dtype, [&](auto type) { forward<decltype(type)>(p); });
}

void moe_combine_backward(const Params& p) {
  find_places(p);
  with_type(p.dtype, [&](auto type) { backward<decltype(type)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
