#include "ume/cuda_info.h"

#include <cuda_runtime_api.h>

namespace ume {

int cuda_runtime_version() { return CUDART_VERSION; }

CudaInfo cuda_info() {
  CudaInfo info{CUDART_VERSION, 0, 0, ""};
  cudaError_t status = cudaDriverGetVersion(&info.driver_version);
  if (status == cudaSuccess) status = cudaGetDeviceCount(&info.device_count);
  if (status != cudaSuccess) {
    info.device_count = 0;
    info.error = cudaGetErrorString(status);
    cudaGetLastError();  // leave no error behind for the next caller
  }
  return info;
}

}  // namespace ume
