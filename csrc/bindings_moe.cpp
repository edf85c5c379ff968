// moe_route, moe_dispatch and moe_combine of uvg_engine._cpu. Fields as in csrc/include/uvg/<op>.h.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "bindings_cpu.h"
#include "uvg/moe_combine.h"
#include "uvg/moe_dispatch.h"
#include "uvg/moe_route.h"

namespace {

void route(bool backward, Address logits, int64_t rows, int64_t experts, int64_t top_k, int dtype, int threads,
           Address weights, Address chosen, Address dweights, Address dlogits) {
  uvg::MoeRouteParams p{};
  p.logits = at<void>(logits), p.rows = rows, p.experts = experts, p.top_k = top_k;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.weights = at<float>(weights), p.chosen = at<int32_t>(chosen);
  p.dweights = at<float>(dweights), p.dlogits = at<void>(dlogits);
  run(backward ? uvg::moe_route_backward : uvg::moe_route_forward, p);
}

void dispatch(bool backward, Address x, Address chosen, int64_t rows, int64_t width, int64_t experts, int64_t top_k,
              int dtype, int threads, Address grouped, Address offsets, Address order, Address places, Address dgrouped,
              Address dx) {
  uvg::MoeDispatchParams p{};
  p.x = at<void>(x), p.chosen = at<int32_t>(chosen);
  p.rows = rows, p.width = width, p.experts = experts, p.top_k = top_k;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.grouped = at<void>(grouped), p.offsets = at<int32_t>(offsets);
  p.order = at<int32_t>(order), p.places = at<int32_t>(places);
  p.dgrouped = at<void>(dgrouped), p.dx = at<void>(dx);
  run(backward ? uvg::moe_dispatch_backward : uvg::moe_dispatch_forward, p);
}

void combine(bool backward, Address grouped, Address order, Address weights, int64_t rows, int64_t width, int64_t top_k,
             int dtype, int threads, Address places, Address out, Address dout, Address dgrouped, Address dweights) {
  uvg::MoeCombineParams p{};
  p.grouped = at<void>(grouped), p.order = at<int32_t>(order), p.weights = at<float>(weights);
  p.rows = rows, p.width = width, p.top_k = top_k;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.places = at<int32_t>(places), p.out = at<void>(out), p.dout = at<void>(dout);
  p.dgrouped = at<void>(dgrouped), p.dweights = at<float>(dweights);
  run(backward ? uvg::moe_combine_backward : uvg::moe_combine_forward, p);
}

template <typename T>
bool all_inside(const T* ids, int64_t count, int64_t end) {
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside = inside && ids[i] >= 0 && ids[i] < end;
  return inside;
}

// Whether every id, of so many bytes, lies in [0, end).
bool asks_inside(Address ids, int64_t bytes, int64_t count, int64_t end) {
  if (bytes != 4 && bytes != 8) throw std::invalid_argument("ids are int32 or int64");
  return bytes == 4 ? all_inside(at<const int32_t>(ids), count, end) : all_inside(at<const int64_t>(ids), count, end);
}

// Whether the order names each of its places once.
bool asks_order(Address order, int64_t count) {
  if (!asks_inside(order, 4, count, count)) return false;
  std::vector<bool> named(static_cast<size_t>(count), false);
  for (int64_t i = 0; i < count; ++i) named[static_cast<size_t>(at<const int32_t>(order)[i])] = true;
  return std::all_of(named.begin(), named.end(), [](bool once) { return once; });
}

}  // namespace

void bind_moe_routing(pybind11::module_& m) {
  def_kernel(m, "moe_route", &route);
  def_kernel(m, "moe_dispatch", &dispatch);
  def_kernel(m, "moe_combine", &combine);
  def_kernel(m, "asks_inside", &asks_inside);
  def_kernel(m, "asks_order", &asks_order);
}
