// moe_route, moe_dispatch and moe_combine of uvg_engine._cpu. Fields as in csrc/include/uvg/<op>.h.
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

}  // namespace

void bind_moe_routing(pybind11::module_& m) {
  m.def("moe_route", &route);
  m.def("moe_dispatch", &dispatch);
  m.def("moe_combine", &combine);
}
