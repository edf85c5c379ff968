// A kernel of _cpu for two callers: Python, by pybind11, and plans (common/plans.h), which keep its arguments as slots.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "common/plans.h"

using Address = std::uintptr_t;  // of a tensor's first element; 0 where there is no tensor

struct Slots {
  std::vector<uvg::Slot> values;
  std::vector<int32_t> addresses;  // which of them are addresses
};

struct KnownKernel {
  uvg::Kernel kernel;
  void (*fill)(Slots& slots, const pybind11::tuple& arguments);
};

inline std::unordered_map<std::string, KnownKernel>& known_kernels() {
  static std::unordered_map<std::string, KnownKernel> kernels;
  return kernels;
}

// How an argument lies in slots.
template <typename T>
struct InSlots {
  static_assert(std::is_arithmetic_v<T>);
  static void put(Slots& slots, const T& value) {
    if constexpr (std::is_same_v<T, Address>) slots.addresses.push_back(static_cast<int32_t>(slots.values.size()));
    uvg::Slot slot{};
    if constexpr (std::is_floating_point_v<T>) {
      slot.real = value;
    } else {
      slot.whole = static_cast<int64_t>(value);
    }
    slots.values.push_back(slot);
  }
  static T get(const uvg::Slot*& slot) {
    if constexpr (std::is_floating_point_v<T>) return static_cast<T>((slot++)->real);
    return static_cast<T>((slot++)->whole);
  }
};

template <typename T, size_t N>
struct InSlots<std::array<T, N>> {
  static void put(Slots& slots, const std::array<T, N>& value) {
    for (const T& each : value) InSlots<T>::put(slots, each);
  }
  static std::array<T, N> get(const uvg::Slot*& slot) {
    std::array<T, N> value;
    for (T& each : value) each = InSlots<T>::get(slot);
    return value;
  }
};

template <typename T>
struct InSlots<std::vector<T>> {
  static void put(Slots& slots, const std::vector<T>& value) {
    InSlots<int64_t>::put(slots, static_cast<int64_t>(value.size()));
    for (const T& each : value) InSlots<T>::put(slots, each);
  }
  static std::vector<T> get(const uvg::Slot*& slot) {
    std::vector<T> value(static_cast<size_t>(InSlots<int64_t>::get(slot)));
    for (T& each : value) each = InSlots<T>::get(slot);
    return value;
  }
};

template <typename... T>
struct InSlots<std::tuple<T...>> {
  static void put(Slots& slots, const std::tuple<T...>& value) {
    std::apply([&](const T&... each) { (InSlots<T>::put(slots, each), ...); }, value);
  }
  static std::tuple<T...> get(const uvg::Slot*& slot) {
    return std::tuple<T...>{InSlots<T>::get(slot)...};  // braces: from left to right
  }
};

template <typename R, typename... A>
struct SlotCall {
  using Arguments = std::tuple<std::decay_t<A>...>;
  static int64_t call(void (*function)(), const uvg::Slot* slots) {
    const auto kernel = reinterpret_cast<R (*)(A...)>(function);  // NOLINT: what it was
    if constexpr (std::is_void_v<R>) {
      std::apply(kernel, InSlots<Arguments>::get(slots));
      return 0;
    } else {
      return static_cast<int64_t>(std::apply(kernel, InSlots<Arguments>::get(slots)));
    }
  }
  static void fill(Slots& slots, const pybind11::tuple& arguments) {
    InSlots<Arguments>::put(slots, arguments.cast<Arguments>());
  }
};

template <typename R, typename... A>
void def_kernel(pybind11::module_& m, const char* name, R (*function)(A...)) {
  m.def(name, function);
  const auto raw = reinterpret_cast<void (*)()>(function);  // NOLINT: cast back before it is called
  known_kernels()[name] = {{SlotCall<R, A...>::call, raw}, SlotCall<R, A...>::fill};
}
