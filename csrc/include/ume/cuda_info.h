// What the CUDA runtime linked into this build sees. Nothing here runs at import.
#pragma once

#include <string>

namespace ume {

struct CudaInfo {
  int runtime_version;  // as CUDART_VERSION: 12040 for 12.4
  int driver_version;   // 0 when no driver is installed
  int device_count;     // 0 when none can be used
  std::string error;    // why device_count is 0; empty when it is not
};

// The runtime this was compiled with; never touches the driver.
int cuda_runtime_version();

// Asks the driver. Call it on request only.
CudaInfo cuda_info();

}  // namespace ume
