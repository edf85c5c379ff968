// What the binding files of _cpu share: how Python hands over tensors, and how a kernel is run.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "bindings_kernel.h"
#include "common/row_lists.h"

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT
}

// Of int32 [samples, per_sample, 2]; samples, per_sample, rows.
using Spans = std::tuple<Address, int64_t, int64_t, int64_t>;

inline uvg::RowLists row_lists(const Spans& spans) {
  const auto [table, samples, per_sample, rows] = spans;
  return uvg::RowLists(at<int32_t>(table), samples, per_sample, rows);
}

// Runs a kernel without Python's lock.
template <typename Params>
void run(void (*kernel)(const Params&), const Params& params) {
  const pybind11::gil_scoped_release release;
  kernel(params);
}

void bind_flow(pybind11::module_& m);         // flow_step, flow_noise
void bind_int8(pybind11::module_& m);         // the ops whose products are in bytes
void bind_moe_routing(pybind11::module_& m);  // moe_route, moe_dispatch, moe_combine
void bind_plans(pybind11::module_& m);        // calls that were made before
