// Which CUDA the driver serves, and which one the kernels are linked with.
#pragma once

namespace uvg::cuda {

// As CUDA counts: 13000 is 13.0. The driver's is 0 where there is none.
struct Versions {
  int driver, runtime;
};

Versions versions();

}  // namespace uvg::cuda
