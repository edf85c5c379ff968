// The launchers of csrc/cuda.
#pragma once

// UVG_CUDA_KERNEL(name, Params): declares uvg::cuda::name(params, stream), which csrc/cuda defines. All pointers are
// device memory; the launch is asynchronous on `stream`, a cudaStream_t. Throws where gpu::launch does.
#define UVG_CUDA_KERNEL(name, Params)            \
  namespace cuda {                               \
  void name(const Params& params, void* stream); \
  }
