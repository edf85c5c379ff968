// The host side of csrc/cuda: `launch` is <<<>>> for nvcc and the simulator for g++.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/gpu.h"

namespace uvg::gpu {

struct Grid {
  int64_t x = 1, y = 1, z = 1;  // blocks
};

using Stream = void*;  // a cudaStream_t; the simulator ignores it

constexpr size_t kStaticSharedLimit = 48 << 10;  // more has to be asked for

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if !UVG_SIMULATE
inline void require_success(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}
#endif

// Runs kernel(params...) on grid blocks of `threads` threads with `shared_bytes` of shared memory, or nothing where the
// grid has no block. Throws std::runtime_error where the device refuses, std::invalid_argument beyond its grid.
template <typename... Params>
void launch(void (*kernel)(Params...), Grid grid, int threads, size_t shared_bytes, Stream stream,
            const std::common_type_t<Params>&... params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (grid.x > 0x7FFFFFFF || grid.y > 0xFFFF || grid.z > 0xFFFF) {
    throw std::invalid_argument("a grid must have at most (2^31 - 1, 65535, 65535) blocks, got (" +
                                std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) +
                                ")");
  }
  const auto x = static_cast<unsigned>(grid.x), y = static_cast<unsigned>(grid.y), z = static_cast<unsigned>(grid.z);
#if UVG_SIMULATE
  static_cast<void>(stream);
  sim::machine().run({x, y, z}, {static_cast<unsigned>(threads), 1, 1}, shared_bytes, [&] { kernel(params...); });
#else
  if (shared_bytes > kStaticSharedLimit) {
    require_success(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  const void* arguments[] = {&params..., nullptr};  // nullptr: an array must have an element
  require_success(cudaLaunchKernel(kernel, dim3(x, y, z), dim3(static_cast<unsigned>(threads)),
                                   const_cast<void**>(arguments), shared_bytes, static_cast<cudaStream_t>(stream)));
#endif
}

}  // namespace uvg::gpu
