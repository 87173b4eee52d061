// Launching kernels from the host: sizes, limits, and errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ume::cuda {

// Throws std::runtime_error that names `what` and CUDA's reason unless `status` is success.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // leave no error behind for the next caller
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Lets `kernel` have `bytes` of dynamic shared memory on the current device.
template <typename Kernel>
void allow_shared_memory(Kernel* kernel, int bytes, const char* what) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        what);
}

// Number of tiles of `size` that cover n.
inline std::int64_t tiles_over(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// A grid dimension; std::runtime_error if it is larger than `most`.
inline unsigned grid_size(std::int64_t blocks, std::int64_t most, const char* what) {
  if (blocks < 1 || blocks > most) {
    throw std::runtime_error(std::string(what) + ": " + std::to_string(blocks) +
                             " blocks, possible are 1 … " + std::to_string(most));
  }
  return static_cast<unsigned>(blocks);
}
inline constexpr std::int64_t kMaxGridX = 2147483647, kMaxGridY = 65535;

// Whether the current device runs the kernels for sm_90a, and this build has them.
inline bool use_sm90() {
#ifdef UME_WITH_SM90
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  return major == 9;
#else
  return false;
#endif
}

}  // namespace ume::cuda
