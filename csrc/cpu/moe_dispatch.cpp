#include "uvg/moe_dispatch.h"

#include "common/threads.h"
#include "cpu/vec.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = MoeDispatchParams;

// A stable counting sort of the slots by expert.
void sort_slots(const Params& p) {
  const int64_t slots = p.rows * p.top_k;
  std::memset(p.offsets, 0, static_cast<size_t>(p.experts + 1) * sizeof *p.offsets);
  for (int64_t s = 0; s < slots; ++s) ++p.offsets[p.chosen[s] + 1];
  for (int64_t e = 0; e < p.experts; ++e) p.offsets[e + 1] += p.offsets[e];
  for (int64_t s = 0; s < slots; ++s) {  // offsets[e] runs from the start of expert e to its end
    const int32_t place = p.offsets[p.chosen[s]]++;
    p.places[s] = place, p.order[place] = static_cast<int32_t>(s);
  }
  for (int64_t e = p.experts; e > 0; --e) p.offsets[e] = p.offsets[e - 1];
  p.offsets[0] = 0;
}

template <typename T>
void backward(const Params& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > kAloneMoeValues)
  for (int64_t t = 0; t < p.rows; ++t) {
    const int32_t* places = p.places + t * p.top_k;
    T* dx = static_cast<T*>(p.dx) + t * p.width;
    columns(p.width, [&](int64_t i, int64_t n) {
      Vec total = {};
      for (int64_t k = 0; k < p.top_k; ++k)
        total += load(static_cast<const T*>(p.dgrouped) + places[k] * p.width + i, n);
      store(dx + i, total, n);
    });
  }
}

}  // namespace

void moe_dispatch_forward(const Params& p) {
  sort_slots(p);
  const auto bytes = static_cast<size_t>(p.width) * (p.dtype == Dtype::kFloat32 ? 4 : 2);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > kAloneMoeValues)
  for (int64_t t = 0; t < p.rows; ++t)
    for (int64_t k = 0; k < p.top_k; ++k)
      std::memcpy(static_cast<char*>(p.grouped) + static_cast<size_t>(p.places[t * p.top_k + k]) * bytes,
                  static_cast<const char*>(p.x) + static_cast<size_t>(t) * bytes, bytes);
}

void moe_dispatch_backward(const Params& p) {
  for (int64_t r = 0; r < p.rows * p.top_k; ++r) p.places[p.order[r]] = static_cast<int32_t>(r);
  with_type(p.dtype, [&](auto type) { backward<decltype(type)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
