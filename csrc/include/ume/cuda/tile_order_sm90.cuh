// In which order persistent blocks walk over tiles. All blocks move at about the same pace, so what
// neighbours in this order share is read from memory once and from L2 by the others.
#pragma once

#include <cstdint>

#include "ume/cuda/tile_layout.cuh"

namespace ume::cuda::sm90 {

// Every tile of a rows x columns matrix, in the bands of tile_place(): a wave of 132 blocks covers
// 16 x 8.25 tiles of 128 x 256, about square, so its operands take the least room (4160 rows of q
// and p: 13 MB of 50 at depth 1536), and p streams from memory once per 2048 rows.
template <int kTileRows, int kTileColumns>
class MatrixTiles {
 public:
  __device__ __forceinline__ MatrixTiles(std::int64_t rows, std::int64_t columns, int block,
                                         int blocks)
      : row_tiles_(static_cast<int>((rows + kTileRows - 1) / kTileRows)),
        column_tiles_(static_cast<int>((columns + kTileColumns - 1) / kTileColumns)),
        at_(static_cast<std::int64_t>(block) - blocks),
        blocks_(blocks) {}

  __device__ __forceinline__ bool next() {
    at_ += blocks_;
    if (at_ >= static_cast<std::int64_t>(row_tiles_) * column_tiles_) return false;
    place_ = tile_place(at_, row_tiles_, column_tiles_);
    return true;
  }

  __device__ __forceinline__ int row() const { return place_.row * kTileRows; }
  __device__ __forceinline__ int column() const { return place_.column * kTileColumns; }

 private:
  int row_tiles_, column_tiles_;
  std::int64_t at_;
  int blocks_;
  TilePlace place_ = {0, 0};
};

// The tiles of pairs (row tile, split of the columns); a pair is walked by one block, columns
// ascending. The row tiles of a split are neighbours and run at the same time: each column is read
// from memory once, whatever the number of row tiles that fit side by side.
template <int kTileRows, int kTileColumns>
class SplitTiles {
 public:
  __device__ __forceinline__ SplitTiles(std::int64_t rows, std::int64_t columns, int splits,
                                        int block, int blocks)
      : row_tiles_(static_cast<int>((rows + kTileRows - 1) / kTileRows)),
        column_tiles_(static_cast<int>((columns + kTileColumns - 1) / kTileColumns)),
        splits_(splits),
        pair_(static_cast<std::int64_t>(block) - blocks),
        blocks_(blocks) {}

  // The next tile, within the pair or of the next one that has any.
  __device__ __forceinline__ bool next() {
    if (++column_tile_ < end_) return true;
    while (next_pair()) {
      if (!empty()) return true;
    }
    return false;
  }

  // The first tile of the next pair, which may have none.
  __device__ __forceinline__ bool next_pair() {
    pair_ += blocks_;
    if (pair_ >= static_cast<std::int64_t>(row_tiles_) * splits_) return false;
    split_ = static_cast<int>(pair_ / row_tiles_);
    row_tile_ = static_cast<int>(pair_ - static_cast<std::int64_t>(split_) * row_tiles_);
    begin_ = column_tile_ = border(split_);
    end_ = border(split_ + 1);
    return true;
  }

  __device__ __forceinline__ bool empty() const { return begin_ == end_; }
  __device__ __forceinline__ bool first() const { return column_tile_ == begin_; }
  __device__ __forceinline__ bool last() const { return column_tile_ + 1 == end_; }
  __device__ __forceinline__ int split() const { return split_; }
  __device__ __forceinline__ int row() const { return row_tile_ * kTileRows; }
  __device__ __forceinline__ int column() const { return column_tile_ * kTileColumns; }

 private:
  // Splits differ by at most one tile.
  __device__ __forceinline__ int border(int split) const {
    return static_cast<int>(static_cast<std::int64_t>(split) * column_tiles_ / splits_);
  }

  int row_tiles_, column_tiles_, splits_;
  int split_ = 0, row_tile_ = 0, column_tile_ = 0, begin_ = 0, end_ = 0;
  std::int64_t pair_;
  int blocks_;
};

}  // namespace ume::cuda::sm90
