#include "common/gpu_driver.h"

#include "common/gpu.h"

namespace uvg::cuda {

Versions versions() {
  Versions found{};
#if !UVG_SIMULATE
  cudaDriverGetVersion(&found.driver);  // on failure it stays 0
  cudaRuntimeGetVersion(&found.runtime);
#endif
  return found;
}

}  // namespace uvg::cuda
