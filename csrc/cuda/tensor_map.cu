#include "ume/cuda/tensor_map.h"

#include <stdexcept>
#include <string>

#ifndef UME_EMULATE
#include <cuda_runtime_api.h>
#include <cudaTypedefs.h>
#endif

namespace ume::cuda {

bool tensor_map_fits(const void* data, std::int64_t rows, std::int64_t depth,
                     std::int64_t row_stride) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;  // coordinates are signed
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && row_stride % 8 == 0 && rows >= 1 &&
         depth >= 1 && row_stride >= depth && rows < kMost && depth < kMost &&
         row_stride < (std::int64_t{1} << 39);
}

#ifndef UME_EMULATE
namespace {

// The driver's function, found through the runtime: the module must import without a driver, so it
// cannot be linked.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function,
                                                     cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr) {
    cudaGetLastError();  // leave no error behind for the next caller
    throw std::runtime_error(
        std::string("the CUDA driver has no cuTensorMapEncodeTiled (CUDA 12.0 or newer): ") +
        (status != cudaSuccess ? cudaGetErrorString(status) : "symbol not found"));
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace
#endif

CUtensorMap row_tiles(const void* data, bool bf16, std::int64_t rows, std::int64_t depth,
                      std::int64_t row_stride, int box_rows) {
  if (!tensor_map_fits(data, rows, depth, row_stride) || box_rows < 1 || box_rows > 256) {
    throw std::invalid_argument(
        "tensor map: needs a 16-byte aligned matrix whose row stride is a multiple of 8 elements");
  }
#ifdef UME_EMULATE
  (void)bf16;
  return CUtensorMap{data, rows, depth, row_stride, box_rows};
#else
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = encoder();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[2] = {kBoxDepth, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult status = encode(
      &map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
#endif
}

}  // namespace ume::cuda
