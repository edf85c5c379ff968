// Element types of the tensors that kernels read and write.
#pragma once

#include <cstdint>

namespace uvg {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1 };

struct BFloat16 {
  uint16_t bits;
};

}  // namespace uvg
