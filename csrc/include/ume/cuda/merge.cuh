// Sums what the tiles of a strip left behind, in a fixed order, one thread per row or column.
#pragma once

#include "ume/cuda/warp_reduce.cuh"

namespace ume::cuda {

// log of a partial sum; -inf for none, and infinite where a term is.
__device__ __forceinline__ float log_of(PartialSum sum) {
  return finite_origin(sum.max) + logf(sum.sum);
}

// row_lse[i] (and the hardest negative) over the column tiles of row i = `row`.
__device__ __forceinline__ void merge_row(const ContrastivePartialsCuda& partials,
                                          const ContrastiveForwardCuda& out, std::int64_t rows,
                                          int column_tiles, std::int64_t row) {
  PartialSum sum = partials.row[row];
  for (int tile = 1; tile < column_tiles; ++tile) sum = merge(sum, partials.row[tile * rows + row]);
  out.row_lse[row] = log_of(sum);
  if (out.hard == nullptr) return;
  float best = -infinity();
  std::int32_t where = -1;
  for (int tile = 0; tile < column_tiles; ++tile) {
    const float value = partials.hard[tile * rows + row];
    if (value > best) {  // a tie stays with the lower columns
      best = value;
      where = partials.hard_index[tile * rows + row];
    }
  }
  out.hard[row] = best;
  out.hard_index[row] = where;
}

// Adds the row tiles of a strip to a column's sum over the strips before.
__device__ __forceinline__ void merge_column(const PartialSum* partials, PartialSum* sums,
                                             std::int64_t columns, int row_tiles,
                                             std::int64_t column) {
  PartialSum sum = sums[column];
  for (int tile = 0; tile < row_tiles; ++tile) {
    sum = merge(sum, partials[tile * columns + column]);
  }
  sums[column] = sum;
}

}  // namespace ume::cuda
