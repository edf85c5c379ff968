// What the threads of a warp or block do together.
#pragma once

#include "common/gpu.h"

namespace uvg::gpu {

// __syncthreads: every thread of the block, at the same line.
UVG_DEVICE void block_barrier([[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::machine().block_barrier(where);
#else
  __syncthreads();
#endif
}

// Barrier `id` (1 to 15) of `threads` threads, whole warps: those that wait and those that only arrive.
UVG_DEVICE void named_barrier_wait(int id, int threads, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::machine().named_barrier(id, threads, true, where);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

UVG_DEVICE void named_barrier_arrive(int id, int threads, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::machine().named_barrier(id, threads, false, where);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Orders memory among the lanes of a warp. Shuffles do not.
UVG_DEVICE void warp_barrier([[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::machine().order_warp(kFullWarp, where);
#else
  __syncwarp();
#endif
}

// The value of lane (own lane ^ mask). All lanes of the warp call it.
template <typename T>
UVG_DEVICE T shuffle_xor(T value, int mask, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = sim::shuffle(kFullWarp, "shuffle_xor", bits, lane() ^ mask, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
#else
  return __shfl_xor_sync(kFullWarp, value, mask);
#endif
}

// The value of lane `source`. All lanes of the warp call it.
template <typename T>
UVG_DEVICE T shuffle_from(T value, int source, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = sim::shuffle(kFullWarp, "shuffle_from", bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
#else
  return __shfl_sync(kFullWarp, value, source);
#endif
}

// Bit l is set where lane l votes. All lanes of the warp call it.
UVG_DEVICE uint32_t ballot(bool vote, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  return sim::ballot(kFullWarp, vote, where);
#else
  return __ballot_sync(kFullWarp, vote);
#endif
}

// Bit l is set where lane l has the same value as this lane. All lanes of the warp call it.
UVG_DEVICE uint32_t lanes_with(int32_t value, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  return sim::match_any(kFullWarp, value, where);
#else
  return __match_any_sync(kFullWarp, value);
#endif
}

// The sum over the warp in a fixed order; every lane gets the same bits.
template <typename T>
UVG_DEVICE T warp_sum(T value, Where where = Where::here()) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask, where);
  return value;
}

// The sum over the lanes up to this one.
template <typename T>
UVG_DEVICE T warp_sum_upto(T value, Where where = Where::here()) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T other = shuffle_from(value, lane() >= step ? lane() - step : lane(), where);
    if (lane() >= step) value += other;
  }
  return value;
}

template <typename T>
UVG_DEVICE T warp_max(T value, Where where = Where::here()) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask, where);
    value = other > value ? other : value;
  }
  return value;
}

// Four 8x8 matrices of 16-bit elements from shared memory: lane 8m+r names row r of matrix m (16 bytes). Of each matrix
// a lane gets two elements: row lane/4, columns 2*(lane%4) and the next.
UVG_DEVICE void load_matrices(uint32_t (&to)[4], const void* row, [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::load_matrices(4, false, row, to, where);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// The same, each matrix transposed.
UVG_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row,
                                         [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  sim::load_matrices(4, true, row, to, where);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// d[16x8] += a[16x16] b[16x8] in fp32. With g = lane/4, t = 2*(lane%4): a = rows g and g+8 at columns t, then both at
// t+8; b = column g at rows t and t+8; d = row g at columns t, t+1, then row g+8.
template <typename T>
UVG_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         [[maybe_unused]] Where where = Where::here()) {
#if UVG_SIMULATE
  const uint32_t b[2] = {b0, b1};
  sim::multiply(sizeof(T) == 2 && T::kIsBFloat16, d, a, b, where);
#else
  if constexpr (T::kIsBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

}  // namespace uvg::gpu
