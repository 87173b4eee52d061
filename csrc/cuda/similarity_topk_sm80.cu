#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ume/cuda/kernels_sm80.cuh"
#include "ume/cuda/launch.h"
#include "ume/similarity_topk_cuda.h"

namespace ume {
namespace cuda::sm80 {
namespace {

// Budget: 128 registers (two blocks of 256 threads share a multiprocessor), no spills.
template <typename T>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerMultiprocessor)
    similarity_topk_sm80(const __grid_constant__ SimilarityTopkCuda problem) {
  topk_block<T>(problem);
}

}  // namespace
}  // namespace cuda::sm80

int similarity_topk_blocks_sm80() { return cuda::sm80::kBlocksPerMultiprocessor; }

void similarity_topk_sm80(const SimilarityTopkCuda& problem, void* stream) {
  using namespace cuda;
  using namespace cuda::sm80;
  const char* const what = "similarity_topk_sm80";
  const auto kernel = problem.element == Element::kBFloat16
                          ? &sm80::similarity_topk_sm80<__nv_bfloat16>
                          : &sm80::similarity_topk_sm80<__half>;
  const dim3 grid(grid_size(tiles_over(problem.queries, Tile::kHeight), kMaxGridX, what),
                  grid_size(problem.splits, kMaxGridY, what));
  allow_shared_memory(kernel, kSharedBytes<Topk>, what);
  kernel<<<grid, Tile::kThreads, kSharedBytes<Topk>, static_cast<cudaStream_t>(stream)>>>(problem);
  check(cudaGetLastError(), what);
}

}  // namespace ume
