// Loads, stores, atomics and asynchronous copies. T may be a Pack: 16 bytes are one LDG.128, STG.128, LDS.128, STS.128.
#pragma once

#include "common/gpu.h"

namespace uvg::gpu {

#if !UVG_SIMULATE
namespace words {
template <size_t kBytes>
struct Of;
template <>
struct Of<1> {
  using Type = uint8_t;
};
template <>
struct Of<2> {
  using Type = uint16_t;
};
template <>
struct Of<4> {
  using Type = uint32_t;
};
template <>
struct Of<8> {
  using Type = uint2;
};
template <>
struct Of<16> {
  using Type = uint4;
};
}  // namespace words

// A value of 1 to 16 bytes as one access.
template <typename T>
UVG_DEVICE T load_whole(const T* p) {
  union {
    typename words::Of<sizeof(T)>::Type word;
    T value;
  } u = {*reinterpret_cast<const typename words::Of<sizeof(T)>::Type*>(p)};
  return u.value;
}

template <typename T>
UVG_DEVICE void store_whole(T* p, const T& value) {
  using Word = typename words::Of<sizeof(T)>::Type;
  *reinterpret_cast<Word*>(p) = reinterpret_cast<const Word&>(value);
}
#endif

template <typename T>
UVG_DEVICE T load_global(const T* p, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::access(sim::Space::kGlobal, sim::Kind::kLoad, p, sizeof(T), where);
  return *p;
#else
  return load_whole(p);
#endif
}

// 16 bytes by hand: nvcc makes four stores of a value that lives longer than one.
template <typename T>
UVG_DEVICE void store_global(T* p, const T& value, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::access(sim::Space::kGlobal, sim::Kind::kStore, p, sizeof(T), where);
  *p = value;
#else
  if constexpr (sizeof(T) == 16) {
    const auto& w = reinterpret_cast<const uint4&>(value);
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(p)), "r"(w.x), "r"(w.y),
                 "r"(w.z), "r"(w.w)
                 : "memory");
  } else {
    store_whole(p, value);
  }
#endif
}

template <typename T>
UVG_DEVICE T load_shared(const T* p, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::access(sim::Space::kShared, sim::Kind::kLoad, p, sizeof(T), where);
  return *p;
#else
  return load_whole(p);
#endif
}

template <typename T>
UVG_DEVICE void store_shared(T* p, const T& value, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::access(sim::Space::kShared, sim::Kind::kStore, p, sizeof(T), where);
  *p = value;
#else
  store_whole(p, value);
#endif
}

// Integers only: a sum of floats would depend on who came first. Returns what was there before.
template <typename T>
UVG_DEVICE T atomic_add_global(T* p, T value, [[maybe_unused]] Where where = Where::here()) {
  static_assert(!static_cast<bool>(T(0.5)), "float atomics have no fixed order");
#if UVG_SIMULATE
  sim::access(sim::Space::kGlobal, sim::Kind::kAtomic, p, sizeof(T), where);
  const T before = *p;
  *p = before + value;
  return before;
#else
  return atomicAdd(p, value);
#endif
}

template <typename T>
UVG_DEVICE T atomic_add_shared(T* p, T value, [[maybe_unused]] Where where = Where::here()) {
  static_assert(!static_cast<bool>(T(0.5)), "float atomics have no fixed order");
#if UVG_SIMULATE
  sim::access(sim::Space::kShared, sim::Kind::kAtomic, p, sizeof(T), where);
  const T before = *p;
  *p = before + value;
  return before;
#else
  return atomicAdd(p, value);
#endif
}

// The block's shared memory, as much as `launch` asked for, aligned to 1024 bytes. Contents are undefined at first.
template <typename T>
UVG_DEVICE T* shared_memory() {
#if UVG_SIMULATE
  return reinterpret_cast<T*>(sim::shared_memory());
#else
  extern __shared__ __align__(1024) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

// 16 bytes from global to shared memory, past the registers; zeros where `there` is false (`from` is not read then).
// They may be read by this thread after async_wait, by others after a barrier that follows it.
UVG_DEVICE void async_copy_16(void* to, const void* from, bool there, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::async_copy(to, from, 16, there ? 16 : 0, where);
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(there ? 16 : 0)
      : "memory");
#endif
}

// Ends a group of async copies.
UVG_DEVICE void async_commit() {
#if UVG_SIMULATE
  sim::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kInFlight groups of this thread are on their way.
template <int kInFlight>
UVG_DEVICE void async_wait() {
#if UVG_SIMULATE
  sim::async_wait(kInFlight);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
#endif
}

}  // namespace uvg::gpu
