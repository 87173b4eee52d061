// Tensor maps: what the copy engine of sm_90 must know about a matrix, encoded by the driver.
#pragma once

#include <cstdint>

#ifdef UME_EMULATE
#include "hopper.h"
#else
#include <cuda.h>
#endif

namespace ume::cuda {

constexpr int kBoxDepth = 64;  // elements of a row in one box: 128 bytes, the swizzle's span

// Whether the copy engine can read such a matrix of 16-bit elements: a 16-byte aligned start and
// row stride, sizes within its 32-bit coordinates.
bool tensor_map_fits(const void* data, std::int64_t rows, std::int64_t depth,
                     std::int64_t row_stride);

// The map of a row-major matrix [rows, depth] of bf16 (or fp16 if !bf16), row_stride in elements,
// read in boxes of box_rows x 64 elements with a 128-byte swizzle; beyond the matrix lie zeros.
//
// Throws std::invalid_argument unless tensor_map_fits() and 1 <= box_rows <= 256, and
// std::runtime_error when the driver is too old or refuses.
CUtensorMap row_tiles(const void* data, bool bf16, std::int64_t rows, std::int64_t depth,
                      std::int64_t row_stride, int box_rows);

}  // namespace ume::cuda
