// Which thread holds which score of a tile, and in which order the tiles of a matrix are visited.
#pragma once

#include <cstdint>

#include "ume/cuda/device.cuh"

namespace ume::cuda {

// A tile of kHeight x kWidth scores in the accumulators of kWarpRows x kWarpColumns warps. A warp
// holds kRowBlocks x kColumnBlocks blocks of 16 x 8 scores, block (m, n) in s[m * kColumnBlocks +
// n]; of a block a lane holds rows lane / 4 and lane / 4 + 8 and columns lane % 4 * 2 + {0, 1}:
// {upper left, upper right, lower left, lower right}. That is the fragment of mma.sync m16n8 and,
// with one row block, of wgmma.
template <int kWarpRows_, int kWarpColumns_, int kRowBlocks_, int kColumnBlocks_>
struct TileLayout {
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kRowBlocks = kRowBlocks_, kColumnBlocks = kColumnBlocks_;
  static constexpr int kHeight = kWarpRows * kRowBlocks * 16;
  static constexpr int kWidth = kWarpColumns * kColumnBlocks * 8;
  static constexpr int kWarps = kWarpRows * kWarpColumns;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kLaneRows = kRowBlocks * 2;        // rows a lane has scores of
  static constexpr int kLaneColumns = kColumnBlocks * 2;  // columns a lane has scores of
  static constexpr int kBlocks = kRowBlocks * kColumnBlocks;
  static_assert(kLaneColumns % 8 == 0, "epilogues take columns in groups of four blocks");

  using Scores = float[kBlocks][4];

  int warp_row, warp_column, lane;

  // `thread` counts the threads that hold scores.
  __device__ __forceinline__ explicit TileLayout(int thread)
      : warp_row(thread / 32 / kWarpColumns),
        warp_column(thread / 32 % kWarpColumns),
        lane(thread % 32) {}

  // Place within the tile of lane row r < kLaneRows and lane column c < kLaneColumns.
  __device__ __forceinline__ int row(int r) const {
    return warp_row * kRowBlocks * 16 + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }
  __device__ __forceinline__ int column(int c) const { return first_column() + column_step(c); }
  __device__ __forceinline__ int first_column() const {
    return warp_column * kColumnBlocks * 8 + lane % 4 * 2;
  }
  static __device__ __forceinline__ constexpr int column_step(int c) { return c / 2 * 8 + c % 2; }
  static __device__ __forceinline__ float& at(Scores& s, int r, int c) {
    return s[r / 2 * kColumnBlocks + c / 2][r % 2 * 2 + c % 2];
  }
};

// Tile number `index` of a matrix of row_tiles x column_tiles: bands of 16 row tiles, within a band
// column after column. The blocks that run at one time then share few row and column operands, and
// find them in the L2 cache.
struct TilePlace {
  int row, column;  // of tiles
};

__device__ __forceinline__ TilePlace tile_place(std::int64_t index, int row_tiles,
                                                int column_tiles) {
  constexpr int kBand = 16;
  const std::int64_t band_tiles = static_cast<std::int64_t>(kBand) * column_tiles;
  const int band = static_cast<int>(index / band_tiles);
  const int within = static_cast<int>(index - band * band_tiles);
  const int left = row_tiles - band * kBand;
  const int height = left < kBand ? left : kBand;
  return {band * kBand + within % height, within / height};
}

}  // namespace ume::cuda
