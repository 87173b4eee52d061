// Which tile kernels run, and what becomes of what they leave behind.
#include "ume/contrastive_loss_cuda.h"

#include "ume/cuda/launch.h"
#include "ume/cuda/merge.cuh"

namespace ume {
namespace cuda {
namespace {

constexpr int kMergeThreads = 256;

__device__ __forceinline__ std::int64_t thread_number() {
  return static_cast<std::int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
}

__global__ void __launch_bounds__(kMergeThreads)
    merge_rows(const __grid_constant__ ContrastivePartialsCuda partials,
               const __grid_constant__ ContrastiveForwardCuda out, std::int64_t rows,
               int column_tiles) {
  const std::int64_t row = thread_number();
  if (row < rows) merge_row(partials, out, rows, column_tiles, row);
}

__global__ void __launch_bounds__(kMergeThreads)
    merge_columns(const PartialSum* partials, PartialSum* sums, std::int64_t columns,
                  int row_tiles) {
  const std::int64_t column = thread_number();
  if (column < columns) merge_column(partials, sums, columns, row_tiles, column);
}

__global__ void __launch_bounds__(kMergeThreads)
    finish_columns(const PartialSum* sums, float* lse, std::int64_t n) {
  const std::int64_t column = thread_number();
  if (column < n) lse[column] = log_of(sums[column]);
}

unsigned merge_grid(std::int64_t n, const char* what) {
  return grid_size(tiles_over(n, kMergeThreads), kMaxGridX, what);
}

// What the partial sums of the kernels that run on the current device cover.
struct TileSize {
  int height, width;
};

TileSize tile_size() {
#ifdef UME_WITH_SM90
  if (use_sm90()) return {contrastive_tile_height_sm90(), contrastive_tile_width_sm90()};
#endif
  return {contrastive_tile_height_sm80(), contrastive_tile_width_sm80()};
}

// The arrays of a workspace, one after the other at multiples of 16 bytes.
struct Workspace {
  ContrastivePartialsCuda partials;
  std::int64_t column_tiles, row_tiles, bytes;

  Workspace(void* start, std::int64_t rows, std::int64_t columns, bool with_columns,
            bool with_hardest)
      : partials{}, bytes(0) {
    const TileSize tile = tile_size();
    column_tiles = tiles_over(columns, tile.width);
    row_tiles = tiles_over(rows, tile.height);
    char* const base = static_cast<char*>(start);
    const auto take = [&](std::int64_t size) {
      char* const at = base == nullptr ? nullptr : base + bytes;
      bytes += tiles_over(size, 16) * 16;
      return static_cast<void*>(at);
    };
    const std::int64_t slots = column_tiles * rows;
    partials.row = static_cast<PartialSum*>(take(slots * sizeof(PartialSum)));
    if (with_columns) {
      partials.col = static_cast<PartialSum*>(take(row_tiles * columns * sizeof(PartialSum)));
    }
    if (with_hardest) {
      partials.hard = static_cast<float*>(take(slots * sizeof(float)));
      partials.hard_index = static_cast<std::int32_t*>(take(slots * sizeof(std::int32_t)));
    }
  }
};

}  // namespace
}  // namespace cuda

std::int64_t contrastive_workspace_cuda(std::int64_t rows, std::int64_t columns, bool with_columns,
                                        bool with_hardest) {
  return cuda::Workspace(nullptr, rows, columns, with_columns, with_hardest).bytes;
}

void contrastive_forward_cuda(const ContrastiveScoresCuda& scores,
                              const ContrastiveForwardCuda& out, void* stream) {
  using namespace cuda;
  const auto on = static_cast<cudaStream_t>(stream);
  Workspace work(out.workspace, scores.rows, scores.columns, out.col != nullptr,
                 out.hard != nullptr);
  work.partials.pos = out.pos;
#ifdef UME_WITH_SM90
  if (use_sm90()) {
    contrastive_forward_tiles_sm90(scores, work.partials, stream);
  } else {
    contrastive_forward_tiles_sm80(scores, work.partials, stream);
  }
#else
  contrastive_forward_tiles_sm80(scores, work.partials, stream);
#endif
  merge_rows<<<merge_grid(scores.rows, "merge_rows"), kMergeThreads, 0, on>>>(
      work.partials, out, scores.rows, static_cast<int>(work.column_tiles));
  check(cudaGetLastError(), "merge_rows");
  if (out.col == nullptr) return;
  merge_columns<<<merge_grid(scores.columns, "merge_columns"), kMergeThreads, 0, on>>>(
      work.partials.col, out.col, scores.columns, static_cast<int>(work.row_tiles));
  check(cudaGetLastError(), "merge_columns");
}

void contrastive_finish_columns_cuda(const PartialSum* sums, float* lse, std::int64_t n,
                                     void* stream) {
  using namespace cuda;
  finish_columns<<<merge_grid(n, "finish_columns"), kMergeThreads, 0,
                   static_cast<cudaStream_t>(stream)>>>(sums, lse, n);
  check(cudaGetLastError(), "finish_columns");
}

void contrastive_gradient_cuda(const ContrastiveScoresCuda& scores,
                               const ContrastiveGradientsCuda& gradients, void* stream) {
#ifdef UME_WITH_SM90
  if (cuda::use_sm90()) return contrastive_gradient_tiles_sm90(scores, gradients, stream);
#endif
  contrastive_gradient_tiles_sm80(scores, gradients, stream);
}

}  // namespace ume
