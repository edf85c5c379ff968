// In place of CUDA's headers: what kernel source names without a wrapper.
#pragma once

#include "sim/collectives.h"
#include "sim/machine.h"
#include "sim/memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::sim::machine().thread().index)
#define blockIdx (::sim::machine().block_index())
#define blockDim (::sim::machine().block_size())
#define gridDim (::sim::machine().grid_size())
