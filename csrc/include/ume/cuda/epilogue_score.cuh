// Scores of a tile from its products, and which of its pairs count: shared by the epilogues of the
// contrastive loss.
#pragma once

#include <cstdint>

#include "ume/contrastive_loss_cuda.h"
#include "ume/cuda/tile_layout.cuh"

namespace ume::cuda {

// Rows and columns of one tile. A mark says whether a row counts in the column direction, a column
// in the row direction; places beyond the matrix do not count.
template <class Layout>
struct TileConditions {
  static constexpr int kHeight = Layout::kHeight, kWidth = Layout::kWidth;

  float row_factor[kHeight], row_mark[kHeight], row_limit[kHeight];
  std::int32_t row_group[kHeight];
  float col_factor[kWidth], col_mark[kWidth], col_limit[kWidth];
  std::int32_t col_group[kWidth];
  std::uint32_t ignored[kHeight][kWidth / 32];  // one bit per pair

  // By all Layout::kThreads threads; they must synchronise before the tile is read, and after it
  // has been before this is called for the next one. A mark is `yes` or `no`.
  __device__ __forceinline__ void load(const ContrastiveScoresCuda& scores, int row0, int col0,
                                       int thread, float yes, float no) {
    const ContrastivePairs& pairs = scores.pairs;
    const float scale = *scores.scale;
    const bool ignoring = pairs.ignore_start != nullptr;
    for (int r = thread; r < kHeight; r += Layout::kThreads) {
      const std::int64_t row = static_cast<std::int64_t>(row0) + r;
      const bool inside = row < scores.rows;
      const bool counts = inside && (pairs.row_mask == nullptr || pairs.row_mask[row] != 0);
      row_factor[r] = !inside ? 0.0f : scores.q_inv == nullptr ? scale : scale * scores.q_inv[row];
      row_mark[r] = counts ? yes : no;
      row_limit[r] = inside && pairs.row_limit != nullptr ? pairs.row_limit[row] : infinity();
      row_group[r] = inside && pairs.row_group != nullptr ? pairs.row_group[row] : 0;
      if (ignoring) {
        for (int word = 0; word < kWidth / 32; ++word) ignored[r][word] = 0;
        if (inside) mark_ignored(pairs, row, r, col0);
      }
    }
    for (int c = thread; c < kWidth; c += Layout::kThreads) {
      const std::int64_t column = static_cast<std::int64_t>(col0) + c;
      const bool inside = column < scores.columns;
      const bool counts = inside && (pairs.col_mask == nullptr || pairs.col_mask[column] != 0);
      col_factor[c] = !inside ? 0.0f : scores.p_inv == nullptr ? 1.0f : scores.p_inv[column];
      col_mark[c] = counts ? yes : no;
      col_limit[c] = inside && pairs.col_limit != nullptr ? pairs.col_limit[column] : infinity();
      col_group[c] = inside && pairs.col_group != nullptr ? pairs.col_group[column] : 0;
    }
  }

 private:
  __device__ __forceinline__ void mark_ignored(const ContrastivePairs& pairs, std::int64_t row,
                                               int r, int col0) {
    std::int64_t low = pairs.ignore_start[row];
    const std::int64_t end = pairs.ignore_start[row + 1];
    std::int64_t high = end;
    while (low < high) {  // first entry that is not left of the tile
      const std::int64_t middle = low + (high - low) / 2;
      if (pairs.ignore_col[middle] < col0) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    for (; low < end && pairs.ignore_col[low] - col0 < kWidth; ++low) {
      const int c = pairs.ignore_col[low] - col0;
      ignored[r][c / 32] |= 1u << c % 32;
    }
  }
};

// What holds for a whole tile.
struct TileFacts {
  int diagonal;   // column - row, within the tile, of the positives; kNone if it has none
  bool ignoring;  // there may be ignored pairs
  bool general;   // more than masks decides which pairs count, or there are positives

  static constexpr int kNone = -(1 << 30);

  template <class Layout>
  static __device__ __forceinline__ TileFacts of(const ContrastiveScoresCuda& scores, int row0,
                                                 int col0) {
    const ContrastivePairs& pairs = scores.pairs;
    const std::int64_t diagonal = pairs.offset + row0 - col0;
    const bool positives = diagonal > -Layout::kHeight && diagonal < Layout::kWidth;
    const bool ignoring = pairs.ignore_start != nullptr;
    return {positives ? static_cast<int>(diagonal) : kNone, ignoring,
            positives || ignoring || pairs.row_group != nullptr || pairs.row_limit != nullptr ||
                pairs.col_limit != nullptr};
  }

  // Lane column c is the positive of `row` if column_step(c) is this. (Comparing with constants
  // leaves the compiler nothing to keep in registers between loops.)
  template <class Layout>
  __device__ __forceinline__ int positive_step(const Layout& layout, int row) const {
    return row + diagonal - layout.first_column();
  }
};

// The ignored pairs of a row among lane columns c … c + 7, c a multiple of 8: bit column_step(c).
template <class Layout>
__device__ __forceinline__ std::uint32_t ignored_steps(const TileConditions<Layout>& tile,
                                                       const TileFacts& facts,
                                                       const Layout& layout, int row, int c) {
  if (!facts.ignoring) return 0;
  const int word = layout.warp_column * (Layout::kColumnBlocks / 4) + c / 8;
  return tile.ignored[row][word] >> layout.lane % 4 * 2;
}

}  // namespace ume::cuda
