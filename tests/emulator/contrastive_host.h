// The contrastive loss's kernels under the emulator: tiles of any generation, then the merges, as
// contrastive_loss.cu launches them.
#pragma once

#include <functional>
#include <vector>

#include "ume/contrastive_loss_cuda.h"
#include "ume/cuda/merge.cuh"

namespace emulator {

// nullptr, or what went wrong; valid until the next call.
inline const char* message_of(const std::function<void()>& work) {
  static std::string message;
  try {
    work();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

inline int tiles_over(std::int64_t n, int size) { return static_cast<int>((n + size - 1) / size); }

// `run_tiles(partials)` runs the tile kernel, whose tiles are `height` x `width`.
template <class RunTiles>
void contrastive_forward(const ume::ContrastiveScoresCuda& scores,
                         const ume::ContrastiveForwardCuda& out, int height, int width,
                         RunTiles run_tiles) {
  const int row_tiles = tiles_over(scores.rows, height);
  const int column_tiles = tiles_over(scores.columns, width);
  const auto slots = static_cast<std::size_t>(column_tiles * scores.rows);
  // NaN: slots that no tile writes will show.
  const ume::PartialSum unwritten{__int_as_float(-1), __int_as_float(-1)};
  std::vector<ume::PartialSum> row(slots, unwritten);
  std::vector<ume::PartialSum> col(static_cast<std::size_t>(row_tiles * scores.columns), unwritten);
  std::vector<float> hard(slots, INFINITY);
  std::vector<std::int32_t> hard_index(slots, -2);
  const ume::ContrastivePartialsCuda partials{row.data(), out.col != nullptr ? col.data() : nullptr,
                                              out.pos, out.hard != nullptr ? hard.data() : nullptr,
                                              hard_index.data()};
  run_tiles(partials);
  for (std::int64_t i = 0; i < scores.rows; ++i) {
    ume::cuda::merge_row(partials, out, scores.rows, column_tiles, i);
  }
  if (out.col == nullptr) return;
  for (std::int64_t j = 0; j < scores.columns; ++j) {
    ume::cuda::merge_column(partials.col, out.col, scores.columns, row_tiles, j);
  }
}

}  // namespace emulator
