// The block programs for sm_80 and newer: main loop and epilogue of each kernel.
#pragma once

#include "ume/cuda/epilogue_gradient.cuh"
#include "ume/cuda/epilogue_lse.cuh"
#include "ume/cuda/epilogue_topk.cuh"
#include "ume/cuda/mainloop_sm80.cuh"

namespace ume::cuda::sm80 {

struct BlockSync {
  static __device__ __forceinline__ void sync() { __syncthreads(); }
};

using Lse = LseEpilogue<Tile, BlockSync>;
template <typename T>
using Gradient = GradientEpilogue<Tile, T>;
using Topk = TopkEpilogue<Tile, BlockSync>;

// Shared memory of a block: the ring, then the epilogue's.
template <class Epilogue>
inline constexpr int kSharedBytes =
    kRingBytes + static_cast<int>(sizeof(typename Epilogue::Shared));

template <class Epilogue>
__device__ __forceinline__ typename Epilogue::Shared& epilogue_memory() {
  return *reinterpret_cast<typename Epilogue::Shared*>(shared_memory() + kRingBytes);
}

__device__ __forceinline__ int tiles_of(std::int64_t n, int size) {
  return static_cast<int>((n + size - 1) / size);
}

// First row and column of this block's tile: a block per tile.
__device__ __forceinline__ TilePlace block_origin(const ContrastiveScoresCuda& scores) {
  const TilePlace place = tile_place(blockIdx.x, tiles_of(scores.rows, Tile::kHeight),
                                     tiles_of(scores.columns, Tile::kWidth));
  return {place.row * Tile::kHeight, place.column * Tile::kWidth};
}

template <typename T>
__device__ __forceinline__ MainLoop<T> tile_loop(const ContrastiveScoresCuda& scores,
                                                 TilePlace origin, int thread) {
  return MainLoop<T>(shared_memory(), {scores.q, scores.rows, scores.q_stride},
                     {scores.p, scores.columns, scores.p_stride}, scores.depth, origin.row,
                     origin.column, 1, thread);
}

template <typename T>
__device__ __forceinline__ void lse_block(const ContrastiveScoresCuda& scores,
                                          const ContrastivePartialsCuda& out) {
  const int thread = static_cast<int>(threadIdx.x);
  const TilePlace origin = block_origin(scores);
  Lse::Shared& shared = epilogue_memory<Lse>();
  MainLoop<T> loop = tile_loop<T>(scores, origin, thread);
  Lse::load(shared, scores, origin.row, origin.column, thread);
  Tile::Scores s;
  loop.multiply_tile(s);  // has a barrier, also after load()
  loop.finish();
  Lse::tile(shared, scores, out, s, origin.row, origin.column, thread);
}

template <typename T>
__device__ __forceinline__ void gradient_block(const ContrastiveScoresCuda& scores,
                                               const ContrastiveGradientsCuda& gradients) {
  using Epilogue = Gradient<T>;
  const int thread = static_cast<int>(threadIdx.x);
  const TilePlace origin = block_origin(scores);
  typename Epilogue::Shared& shared = epilogue_memory<Epilogue>();
  MainLoop<T> loop = tile_loop<T>(scores, origin, thread);
  Epilogue::load(shared, scores, gradients, origin.row, origin.column, thread);
  Tile::Scores s;
  loop.multiply_tile(s);  // has a barrier, also after load()
  loop.finish();
  Epilogue::tile(shared, scores, gradients, s, origin.row, origin.column, thread);
}

// Block (x, y) scans split y for row tile x: blocks that run together share their candidates.
template <typename T>
__device__ __forceinline__ void topk_block(const SimilarityTopkCuda& problem) {
  const int thread = static_cast<int>(threadIdx.x);
  const int row0 = static_cast<int>(blockIdx.x) * Tile::kHeight;
  const int split = static_cast<int>(blockIdx.y);
  const std::int64_t tiles = tiles_of(problem.candidates, Tile::kWidth);
  const int first = static_cast<int>(tiles * split / problem.splits);
  const int end = static_cast<int>(tiles * (split + 1) / problem.splits);
  Topk::Shared& shared = epilogue_memory<Topk>();
  Topk::start(shared, problem, row0, thread);
  MainLoop<T> loop(shared_memory(), {problem.q, problem.queries, problem.q_stride},
                   {problem.c, problem.candidates, problem.c_stride}, problem.depth, row0,
                   first * Tile::kWidth, end - first, thread);
  for (int tile = first; tile < end; ++tile) {
    const int col0 = tile * Tile::kWidth;
    // The barriers of multiply_tile part this from the tile before and from its use. The one before
    // is over its factors: it has passed a barrier since.
    Topk::load(shared, problem, col0, thread);
    Tile::Scores s;
    loop.multiply_tile(s);
    Topk::tile(shared, problem, s, row0, col0, split, thread);
  }
  loop.finish();
  Topk::finish(shared, problem, row0, split, thread);
}

}  // namespace ume::cuda::sm80
