// What the binding files of _cpu share: how Python hands over tensors, and how a kernel is run.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "common/row_lists.h"

using Address = std::uintptr_t;  // of a tensor's first element; 0 where there is no tensor

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT
}

using Spans = std::array<int64_t, 4>;  // address of int32 [samples, per_sample, 2], samples, per_sample, rows

inline uvg::RowLists row_lists(const Spans& spans) {
  return uvg::RowLists(at<int32_t>(static_cast<Address>(spans[0])), spans[1], spans[2], spans[3]);
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
