// moe_route, moe_dispatch and moe_combine: the way of rows to their experts and back.
#include <numeric>

#include "tests/kernel_test.h"
#include "uvg/moe_combine.h"
#include "uvg/moe_dispatch.h"
#include "uvg/moe_route.h"

using namespace uvg;
using namespace uvg::test;

namespace {

std::vector<double> softmax(const Array& logits, int64_t row, int64_t experts) {
  std::vector<double> p(experts);
  double sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += p[e] = std::exp(static_cast<double>(logits[row * experts + e]));
  for (double& each : p) each /= sum;
  return p;
}

void check_route(int64_t rows, int64_t experts, int64_t top_k) {
  const auto logits = [&](Dtype dtype) { return Array::random(dtype, rows * experts, 1, 3.0f); };
  const auto run = [&](Dtype dtype, int threads) {
    Array in = logits(dtype), dweights = Array::random(Dtype::kFloat32, rows * top_k, 2);
    Arrays out = {Array(Dtype::kFloat32, rows * top_k), Array(dtype, rows * experts)};
    std::vector<int32_t> chosen(rows * top_k);
    MoeRouteParams p{};
    p.logits = in.data(), p.rows = rows, p.experts = experts, p.top_k = top_k, p.dtype = dtype, p.threads = threads;
    p.weights = out[0].floats(), p.chosen = chosen.data();
    p.dweights = dweights.floats(), p.dlogits = out[1].data();
    moe_route_forward(p);
    moe_route_backward(p);
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Array in = logits(dtype);
    std::vector<double> weights;
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> p = softmax(in, r, experts);
      std::sort(p.rbegin(), p.rend());
      const double sum = std::accumulate(p.begin(), p.begin() + top_k, 0.0);
      for (int64_t k = 0; k < top_k; ++k) weights.push_back(p[k] / sum);
    }
    return Truth{weights};
  });
}

// There and back with weights that sum to one: the rows themselves, forward and backward.
void check_round_trip(int64_t rows, int64_t width, int64_t experts, int64_t top_k) {
  std::vector<int32_t> chosen(rows * top_k);
  for (int64_t i = 0; i < rows * top_k; ++i) chosen[i] = static_cast<int32_t>((i / top_k * 7 + i % top_k) % experts);
  Array weights(Dtype::kFloat32, rows * top_k);
  for (int64_t i = 0; i < weights.size(); ++i) weights.set(i, 1.0f / static_cast<float>(top_k));
  const auto run = [&](Dtype dtype, int threads) {
    Array x = Array::random(dtype, rows * width, 1), dout = Array::random(dtype, rows * width, 2);
    Array grouped(dtype, rows * top_k * width), dgrouped(dtype, rows * top_k * width);
    Arrays out = {Array(dtype, rows * width), Array(dtype, rows * width), Array(Dtype::kFloat32, rows * top_k)};
    std::vector<int32_t> offsets(experts + 1), order(rows * top_k), places(rows * top_k);
    MoeDispatchParams d{};
    d.x = x.data(), d.chosen = chosen.data(), d.rows = rows, d.width = width, d.experts = experts, d.top_k = top_k;
    d.dtype = dtype, d.threads = threads, d.grouped = grouped.data(), d.offsets = offsets.data();
    d.order = order.data(), d.places = places.data(), d.dgrouped = dgrouped.data(), d.dx = out[1].data();
    moe_dispatch_forward(d);
    CHECK(offsets.front() == 0 && offsets.back() == rows * top_k);
    MoeCombineParams c{};
    c.grouped = grouped.data(), c.order = order.data(), c.weights = weights.floats();
    c.rows = rows, c.width = width, c.top_k = top_k, c.dtype = dtype, c.threads = threads;
    c.places = places.data(), c.out = out[0].data(), c.dout = dout.data();
    c.dgrouped = dgrouped.data(), c.dweights = out[2].floats();
    moe_combine_forward(c);
    moe_combine_backward(c);
    moe_dispatch_backward(d);
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    return Truth{values(Array::random(dtype, rows * width, 1)), values(Array::random(dtype, rows * width, 2))};
  });
}

}  // namespace

int main() {
  check_route(1, 1, 1);
  static_assert(300 > kAloneMoeRows && 301 * 57 > kAloneMoeValues);
  check_route(300, 9, 2);
  check_route(17, 67, 8);
  check_round_trip(1, 1, 1, 1);
  check_round_trip(301, 57, 5, 2);
  check_round_trip(40, 130, 8, 8);
  check_round_trip(23, 64, 5, 2);
  return finish("moe_routing");
}
