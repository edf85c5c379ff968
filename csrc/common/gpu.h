// The device side of csrc/cuda: what a kernel may use, for nvcc and for the simulator (UVG_SIMULATE).
//
// Every instruction that CUDA C++ has no plain word for, and every access to memory, is one named function with two
// bodies: one line of CUDA or PTX, and its emulation in csrc/sim, which checks and counts it. Kernels use these only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

#if UVG_SIMULATE
#include "sim/cuda.h"
#define UVG_DEVICE inline
#define UVG_HOST_DEVICE inline
#else
#define UVG_DEVICE __device__ __forceinline__
#define UVG_HOST_DEVICE __host__ __device__ __forceinline__
#endif

namespace uvg::gpu {

#if UVG_SIMULATE
using Where = sim::Where;
#else
struct Where {  // takes no room and no register
  static constexpr __host__ __device__ Where here() { return {}; }
};
#endif

constexpr int kWarp = 32;
constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

// N neighbouring elements that travel in one access of N * sizeof(T) bytes.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

UVG_DEVICE int warp_in_block() { return static_cast<int>(threadIdx.x) / kWarp; }
UVG_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// The number of a row of blocks, as the int64 that addresses are computed with.
UVG_DEVICE int64_t block_x() { return static_cast<int64_t>(blockIdx.x); }
UVG_DEVICE int64_t block_y() { return static_cast<int64_t>(blockIdx.y); }
UVG_DEVICE int64_t block_z() { return static_cast<int64_t>(blockIdx.z); }

}  // namespace uvg::gpu
