// Launches a Problem of kernel_sm90.cuh on the current device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "ume/cuda/kernels_sm90.cuh"
#include "ume/cuda/launch.h"
#include "ume/cuda/tensor_map.h"
#include "ume/element.h"

namespace ume::cuda::sm90 {

// A row-major matrix of 16-bit elements.
struct Operand {
  const void* data;
  std::int64_t rows, stride;
};

// Budget: 168 registers at launch (65536 / 384, before they are redistributed), no spills.
template <class Problem>
__global__ void __launch_bounds__(kThreads, 1)
    block_program(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap p,
                  const __grid_constant__ typename Problem::Params params) {
#ifdef UME_SM90A
  run_block<Problem>(q, p, params);
#endif
}

// `work`: pieces that blocks can take; there are as many blocks as multiprocessors at most.
template <class Problem>
void launch_as(const char* what, bool bf16, const Operand& q, const Operand& p, std::int64_t depth,
               const typename Problem::Params& params, std::int64_t work, void* stream) {
  const CUtensorMap q_map = row_tiles(q.data, bf16, q.rows, depth, q.stride, kTileRows);
  const CUtensorMap p_map =
      row_tiles(p.data, bf16, p.rows, depth, p.stride, Problem::kTileColumns);
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), what);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), what);
  constexpr int kSharedBytes = kSharedBytesOf<Problem>;
  allow_shared_memory(block_program<Problem>, kSharedBytes, what);
  const unsigned blocks = grid_size(std::min<std::int64_t>(work, processors), kMaxGridX, what);
  block_program<Problem>
      <<<blocks, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(q_map, p_map, params);
  check(cudaGetLastError(), what);
}

template <template <typename> class Problem, class Params>
void launch(const char* what, Element element, const Operand& q, const Operand& p,
            std::int64_t depth, const Params& params, std::int64_t work, void* stream) {
  if (element == Element::kBFloat16) {
    launch_as<Problem<__nv_bfloat16>>(what, true, q, p, depth, params, work, stream);
  } else if (element == Element::kFloat16) {
    launch_as<Problem<__half>>(what, false, q, p, depth, params, work, stream);
  } else {
    throw std::invalid_argument(std::string(what) + ": operands must be bf16 or fp16");
  }
}

}  // namespace ume::cuda::sm90
