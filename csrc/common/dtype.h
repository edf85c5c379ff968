// Element types of the tensors that kernels read and write.
#pragma once

#include <cstdint>

namespace uvg {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  static constexpr bool kIsBFloat16 = true;
  uint16_t bits;
};

struct Float16 {
  static constexpr bool kIsBFloat16 = false;
  uint16_t bits;
};

}  // namespace uvg
