#include "uvg/moe_route.h"

#include "common/pack_values.h"
#include "common/threads.h"
#include "cpu/vec.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = MoeRouteParams;

template <typename T>
inline float number(T value) {
  float out;
  uvg::convert(value, out);
  return out;
}

inline void put(float* to, float value) { *to = value; }

template <typename T>
inline void put(T* to, float value) {
  store(to, splat(value), 1);
}

// Whether a logit ranks before another: the larger does, and NaN before all, as in torch.sort.
inline bool before(float a, float b) { return a > b || (a != a && b == b); }

// The top_k of a row, kept sorted while its logits pass by once; ties to the lower index. best: their logits.
template <typename T>
void select(const T* logits, int64_t experts, int64_t top_k, float* best, int32_t* chosen) {
  int64_t known = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const float logit = number(logits[e]);
    if (known == top_k && !before(logit, best[top_k - 1])) continue;
    int64_t place = known < top_k ? known++ : top_k - 1;
    for (; place > 0 && before(logit, best[place - 1]); --place)
      best[place] = best[place - 1], chosen[place] = chosen[place - 1];
    best[place] = logit, chosen[place] = static_cast<int32_t>(e);
  }
}

template <typename T>
void forward(const Params& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows > kAloneMoeRows)
  for (int64_t r = 0; r < p.rows; ++r) {
    float* weights = p.weights + r * p.top_k;
    select(static_cast<const T*>(p.logits) + r * p.experts, p.experts, p.top_k, weights, p.chosen + r * p.top_k);
    const float most = weights[0];
    double total = 0.0;  // the softmax over all experts, renormalised, is the softmax over the chosen
    for (int64_t k = 0; k < p.top_k; ++k) total += weights[k] = __builtin_expf(weights[k] - most);
    for (int64_t k = 0; k < p.top_k; ++k) weights[k] = static_cast<float>(weights[k] / total);
  }
}

template <typename T>
void backward(const Params& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows > kAloneMoeRows)
  for (int64_t r = 0; r < p.rows; ++r) {
    const float *weights = p.weights + r * p.top_k, *dweights = p.dweights + r * p.top_k;
    T* dlogits = static_cast<T*>(p.dlogits) + r * p.experts;
    std::memset(dlogits, 0, static_cast<size_t>(p.experts) * sizeof(T));
    double mean = 0.0;
    for (int64_t k = 0; k < p.top_k; ++k) mean += double{weights[k]} * dweights[k];
    for (int64_t k = 0; k < p.top_k; ++k)
      put(dlogits + p.chosen[r * p.top_k + k], static_cast<float>(weights[k] * (dweights[k] - mean)));
  }
}

}  // namespace

void moe_route_forward(const Params& p) {
  with_type(p.dtype, [&](auto type) { forward<decltype(type)>(p); });
}

void moe_route_backward(const Params& p) {
  with_type(p.dtype, [&](auto type) { backward<decltype(type)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
