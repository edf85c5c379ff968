// Named values from Python into the fields of a params struct. Tensors are (address, bytes), None is null.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/dtype.h"

#if UVG_SIMULATE
#include "sim/memory.h"
#endif

namespace uvg {

class Fields {
 public:
  explicit Fields(const pybind11::dict& given) : given_(given) {}

  // Sets `to` where the name was given; else it stays as it is, which for a params struct is null or zero.
  template <typename T>
  Fields& operator()(const char* name, T& to) {
    known_.insert(name);
    if (given_.contains(name)) set(given_[name], to);
    return *this;
  }

  // Throws std::invalid_argument where a name was given that no field has.
  void done() const {
    for (const auto& item : given_) {
      const auto name = item.first.cast<std::string>();
      if (known_.count(name) == 0) throw std::invalid_argument("no field is named '" + name + "'");
    }
  }

 private:
  template <typename T>
  static void set(const pybind11::handle& value, T*& to) {
    to = nullptr;
    if (value.is_none()) return;
    const auto [address, bytes] = value.cast<std::pair<uintptr_t, size_t>>();
    to = reinterpret_cast<T*>(address);  // NOLINT
#if UVG_SIMULATE
    sim::register_buffer(to, bytes, !std::is_const_v<T>);
#else
    static_cast<void>(bytes);
#endif
  }

  template <typename T, size_t kCount>
  static void set(const pybind11::handle& value, T* (&to)[kCount]) {
    const auto each = value.cast<std::array<pybind11::object, kCount>>();
    for (size_t i = 0; i < kCount; ++i) set(each[i], to[i]);
  }

  static void set(const pybind11::handle& value, Dtype& to) { to = static_cast<Dtype>(value.cast<int>()); }
  static void set(const pybind11::handle& value, int64_t& to) { to = value.cast<int64_t>(); }
  static void set(const pybind11::handle& value, float& to) { to = value.cast<float>(); }
  static void set(const pybind11::handle& value, double& to) { to = value.cast<double>(); }

  pybind11::dict given_;
  std::set<std::string> known_;
};

}  // namespace uvg
