// Draws by name on the device, the words of uvg_engine/reference/philox.py.
#pragma once

#include "common/gpu_math.h"
#include "common/gpu_memory.h"
#include "common/philox.h"

namespace uvg::cuda {

UVG_DEVICE PhiloxWords draw(int64_t seed, int64_t step, PhiloxStream stream, int64_t token, int64_t tile = 0) {
  return philox4x32({static_cast<uint32_t>(step), stream, static_cast<uint32_t>(token), static_cast<uint32_t>(tile)},
                    philox_key(seed));
}

// Two standard normals of two words, by Box and Muller.
UVG_DEVICE void normals(uint32_t radius, uint32_t turn, float& first, float& second) {
  const float r = gpu::square_root(-2.0f * gpu::log(philox_uniform(radius)));
  gpu::sine_cosine(philox_uniform(turn), second, first);
  first *= r, second *= r;
}

}  // namespace uvg::cuda
