// Sizes up to which a kernel runs in one thread, as another one would cost more than it brings; untuned. Tests read
// them: a case that shall see several threads is larger. Beyond, it takes all threads that it may: libgomp ends threads
// that a smaller team leaves over and makes new ones for the next region (15 times as long, AGENTS.md).
#pragma once

#include <cstdint>

namespace uvg {

constexpr int64_t kAloneRowValues = 32768;       // rows * width of norms, residuals and qk_norm_rope
constexpr int64_t kAloneMoeValues = 16384;       // rows * width of moe_dispatch and moe_combine
constexpr int64_t kAloneMoeRows = 256;           // rows of moe_route
constexpr int64_t kAloneStepValues = 16384;      // latents, or tokens, of flow_step; also of its chunks
constexpr int64_t kAloneNoiseValues = 8192;      // latents, or tokens, of flow_noise; also of its chunks
constexpr int64_t kAloneProducts = 32768;        // multiplications for each thread of linear, moe_mlp, attention
constexpr int64_t kAloneHeadProducts = 4000000;  // rows * vocab * width of a vocabulary head

}  // namespace uvg
