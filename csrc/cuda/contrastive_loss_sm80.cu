#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ume/contrastive_loss_cuda.h"
#include "ume/cuda/kernels_sm80.cuh"
#include "ume/cuda/launch.h"

namespace ume {
namespace cuda::sm80 {
namespace {

// Budget: 128 registers (two blocks of 256 threads share a multiprocessor), no spills.
template <typename T>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerMultiprocessor)
    contrastive_lse_sm80(const __grid_constant__ ContrastiveScoresCuda scores,
                         const __grid_constant__ ContrastivePartialsCuda out) {
  lse_block<T>(scores, out);
}

// Budget: 128 registers, no spills.
template <typename T>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerMultiprocessor)
    contrastive_gradient_sm80(const __grid_constant__ ContrastiveScoresCuda scores,
                              const __grid_constant__ ContrastiveGradientsCuda gradients) {
  gradient_block<T>(scores, gradients);
}

template <typename Kernel, typename Results>
void launch(Kernel* kernel, int shared, const char* what, const ContrastiveScoresCuda& scores,
            const Results& results, void* stream) {
  const std::int64_t tiles = tiles_over(scores.rows, Tile::kHeight) *
                             tiles_over(scores.columns, Tile::kWidth);
  const unsigned grid = grid_size(tiles, kMaxGridX, what);
  allow_shared_memory(kernel, shared, what);
  kernel<<<grid, Tile::kThreads, shared, static_cast<cudaStream_t>(stream)>>>(scores, results);
  check(cudaGetLastError(), what);
}

}  // namespace
}  // namespace cuda::sm80

int contrastive_tile_height_sm80() { return cuda::sm80::Tile::kHeight; }
int contrastive_tile_width_sm80() { return cuda::sm80::Tile::kWidth; }

void contrastive_forward_tiles_sm80(const ContrastiveScoresCuda& scores,
                                    const ContrastivePartialsCuda& partials, void* stream) {
  using namespace cuda::sm80;
  const auto kernel = scores.element == Element::kBFloat16 ? &contrastive_lse_sm80<__nv_bfloat16>
                                                           : &contrastive_lse_sm80<__half>;
  launch(kernel, kSharedBytes<Lse>, "contrastive_lse_sm80", scores, partials, stream);
}

void contrastive_gradient_tiles_sm80(const ContrastiveScoresCuda& scores,
                                     const ContrastiveGradientsCuda& gradients, void* stream) {
  using namespace cuda::sm80;
  const auto kernel = scores.element == Element::kBFloat16
                          ? &contrastive_gradient_sm80<__nv_bfloat16>
                          : &contrastive_gradient_sm80<__half>;
  launch(kernel, kSharedBytes<Gradient<__half>>, "contrastive_gradient_sm80", scores, gradients,
         stream);
}

}  // namespace ume
