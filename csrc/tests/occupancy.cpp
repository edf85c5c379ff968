// NVIDIA's occupancy calculator as a filter. bench/occupancy.py compiles and calls it; needs no GPU and no driver.
//
// A line of input: capability major, minor, bytes of shared memory of a multiprocessor, then threads of a block,
// registers of a thread and bytes of shared memory of a block. A line of output: blocks that a multiprocessor holds.
#include <cuda_occupancy.h>

#include <cstdio>

int main() {
  int major = 0, minor = 0, threads = 0, registers = 0;
  unsigned long shared_of_sm = 0, shared = 0;
  while (std::scanf("%d %d %lu %d %d %lu", &major, &minor, &shared_of_sm, &threads, &registers, &shared) == 6) {
    constexpr int kReserved = 1024, kRegisters = 65536, kThreads = 2048;  // from sm_80 to sm_100 the same
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = kThreads, device.warpSize = 32;
    device.regsPerBlock = device.regsPerMultiprocessor = kRegisters;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = shared_of_sm;
    device.sharedMemPerBlockOptin = shared_of_sm - kReserved, device.reservedSharedMemPerBlock = kReserved;
    device.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers, kernel.numBlockBarriers = 1;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
    const cudaOccDeviceState state;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    if (error != CUDA_OCC_SUCCESS) return 1;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
