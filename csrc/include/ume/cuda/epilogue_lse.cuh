// Epilogue of the contrastive loss's forward: the partial sums of exp(score) of a tile's rows and
// columns, the positives it holds and its hardest negatives.
#pragma once

#include "ume/cuda/epilogue_score.cuh"
#include "ume/cuda/warp_reduce.cuh"

namespace ume::cuda {

// Sync::sync() is a barrier among the Layout::kThreads threads that hold scores. Per tile:
// load(), one barrier, then tile(), which ends fit for the next load().
template <class Layout, class Sync>
struct LseEpilogue {
  static constexpr int kHeight = Layout::kHeight, kWidth = Layout::kWidth;

  struct Shared {
    TileConditions<Layout> conditions;
    PartialSum row[Layout::kWarpColumns][kHeight];
    PartialSum col[Layout::kWarpRows][kWidth];
    float hard[Layout::kWarpColumns][kHeight];
    std::int32_t hard_index[Layout::kWarpColumns][kHeight];
  };

  static __device__ __forceinline__ void load(Shared& shared, const ContrastiveScoresCuda& scores,
                                              int row0, int col0, int thread) {
    shared.conditions.load(scores, row0, col0, thread, 1.0f, 0.0f);
  }

  // s: products in, scores out.
  static __device__ __forceinline__ void tile(Shared& shared, const ContrastiveScoresCuda& scores,
                                              const ContrastivePartialsCuda& out,
                                              typename Layout::Scores& s, int row0, int col0,
                                              int thread) {
    const Layout layout(thread);
    const TileFacts facts = TileFacts::of<Layout>(scores, row0, col0);
    const Range range = facts.general
                            ? find_scores<true>(shared, scores, out, s, layout, facts, row0, col0)
                            : find_scores<false>(shared, scores, out, s, layout, facts, row0, col0);
    if (out.hard != nullptr) hardest(shared, s, layout, facts);
    const bool limited = scores.pairs.row_limit != nullptr || scores.pairs.col_limit != nullptr;
    if (!limited && range.high - range.low <= kNear) {
      near_sums(shared, s, layout, finite_origin(range.high));
    } else {
      far_sums(shared, s, layout, facts);
    }
    Sync::sync();
    write(shared, scores, out, row0, col0, thread);
  }

 private:
  // A warp whose scores lie this close together needs one exponential per score, relative to the
  // largest: no term can underflow (2^-126 is e^-87). Otherwise two, relative to the maxima of row
  // and column; likewise with limits, which for one exponential would take more registers than
  // there are beside a wide tile's scores.
  static constexpr float kNear = 80.0f;

  // Columns of a lane that are worked on at a time: what belongs to all would not fit beside a wide
  // tile's scores.
  static constexpr int kChunk = Layout::kLaneColumns < 16 ? Layout::kLaneColumns : 16;

  struct Range {
    float high, low;
  };

  // Scores from products, -inf for pairs that count in neither direction. Returns the range of the
  // others over the warp.
  template <bool kGeneral>
  static __device__ __forceinline__ Range find_scores(Shared& shared,
                                                      const ContrastiveScoresCuda& scores,
                                                      const ContrastivePartialsCuda& out,
                                                      typename Layout::Scores& s,
                                                      const Layout& layout,
                                                      const TileFacts& facts, int row0, int col0) {
    const TileConditions<Layout>& tile = shared.conditions;
    float high = -infinity(), low = infinity();
#pragma unroll
    for (int r = 0; r < Layout::kLaneRows; ++r) {
      const int row = layout.row(r);
      const float factor = tile.row_factor[row];
      const std::int32_t group = kGeneral ? tile.row_group[row] : 0;
      const int positive = facts.positive_step(layout, row);
      std::uint32_t ignored = 0;
      float pos = 0.0f;
      bool has_pos = false;
#pragma unroll
      for (int c = 0; c < Layout::kLaneColumns; ++c) {
        if (c % kChunk == 0) forget_loads();
        const int column = layout.column(c);
        float& v = Layout::at(s, r, c);
        v = v * factor * tile.col_factor[column];
        bool counts = true;
        if constexpr (kGeneral) {
          if (Layout::column_step(c) == positive) {
            pos = v;
            has_pos = true;
          }
          if (c % 8 == 0) ignored = ignored_steps(tile, facts, layout, row, c);
          counts = group == tile.col_group[column] &&
                   (ignored >> Layout::column_step(c % 8) & 1u) == 0;
        }
        if (counts) {
          low = fminf(low, v);
        } else {
          v = -infinity();
        }
        high = fmaxf(high, v);
      }
      if (has_pos && row0 + row < scores.rows && col0 + row + facts.diagonal < scores.columns) {
        out.pos[row0 + row] = pos;
      }
    }
    return {reduce_warp(high, Max()), reduce_warp(low, Min())};
  }

  // The sums with all exponentials relative to `origin`.
  static __device__ __forceinline__ void near_sums(Shared& shared, typename Layout::Scores& s,
                                                   const Layout& layout, float origin) {
    const TileConditions<Layout>& tile = shared.conditions;
    const float shift = -origin * kLog2E;
    float row_sum[Layout::kLaneRows];
#pragma unroll
    for (int r = 0; r < Layout::kLaneRows; ++r) row_sum[r] = 0.0f;
#pragma unroll
    for (int first = 0; first < Layout::kLaneColumns; first += kChunk) {
      float col_sum[kChunk];
#pragma unroll
      for (int c = 0; c < kChunk; ++c) col_sum[c] = 0.0f;
#pragma unroll
      for (int r = 0; r < Layout::kLaneRows; ++r) {
        forget_loads();
        const float mark = tile.row_mark[layout.row(r)];
#pragma unroll
        for (int c = 0; c < kChunk; ++c) {
          const int column = layout.column(first + c);
          const float term = exp2_fast(fmaf(Layout::at(s, r, first + c), kLog2E, shift));
          row_sum[r] = fmaf(term, tile.col_mark[column], row_sum[r]);
          col_sum[c] = fmaf(term, mark, col_sum[c]);
        }
      }
      scatter_column_sums(col_sum, layout.lane);
      const int start = first + scattered_start<kChunk>(layout.lane);
#pragma unroll
      for (int c = 0; c < kChunk / 8; ++c) {
        shared.col[layout.warp_row][layout.column(start + c)] = {
            col_sum[c] == 0.0f ? -infinity() : origin, col_sum[c]};
      }
    }
#pragma unroll
    for (int r = 0; r < Layout::kLaneRows; ++r) {
      const float sum = reduce_row(row_sum[r], Add());
      if (layout.lane % 4 == 0) {
        shared.row[layout.warp_column][layout.row(r)] = {sum == 0.0f ? -infinity() : origin, sum};
      }
    }
  }

  // Whether a score is dropped for exceeding a limit; NaN is not.
  static __device__ __forceinline__ bool beyond(float v, float limit, bool positive) {
    return v > limit && !positive;
  }

  static __device__ __forceinline__ void far_sums(Shared& shared, typename Layout::Scores& s,
                                                  const Layout& layout, const TileFacts& facts) {
    const TileConditions<Layout>& tile = shared.conditions;
#pragma unroll
    for (int r = 0; r < Layout::kLaneRows; ++r) {
      const int row = layout.row(r);
      const float limit = tile.row_limit[row];
      const int positive = facts.positive_step(layout, row);
      const auto counts = [&](int c) {
        return tile.col_mark[layout.column(c)] != 0.0f &&
               !beyond(Layout::at(s, r, c), limit, Layout::column_step(c) == positive);
      };
      float max = -infinity(), sum = 0.0f;
#pragma unroll
      for (int c = 0; c < Layout::kLaneColumns; ++c) {
        if (c % kChunk == 0) forget_loads();
        if (counts(c)) max = fmaxf(max, Layout::at(s, r, c));
      }
      max = reduce_row(max, Max());
#pragma unroll
      for (int c = 0; c < Layout::kLaneColumns; ++c) {
        if (c % kChunk == 0) forget_loads();
        if (counts(c)) sum += exp2_fast((Layout::at(s, r, c) - finite_origin(max)) * kLog2E);
      }
      sum = reduce_row(sum, Add());
      if (layout.lane % 4 == 0) shared.row[layout.warp_column][row] = {max, sum};
    }
#pragma unroll
    for (int c = 0; c < Layout::kLaneColumns; ++c) {
      forget_loads();
      const int column = layout.column(c);
      const float limit = tile.col_limit[column];
      const auto counts = [&](int r) {
        const int row = layout.row(r);
        return tile.row_mark[row] != 0.0f &&
               !beyond(Layout::at(s, r, c), limit, row + facts.diagonal == column);
      };
      float max = -infinity(), sum = 0.0f;
#pragma unroll
      for (int r = 0; r < Layout::kLaneRows; ++r) {
        if (counts(r)) max = fmaxf(max, Layout::at(s, r, c));
      }
      max = reduce_column(max, Max());
#pragma unroll
      for (int r = 0; r < Layout::kLaneRows; ++r) {
        if (counts(r)) sum += exp2_fast((Layout::at(s, r, c) - finite_origin(max)) * kLog2E);
      }
      sum = reduce_column(sum, Add());
      if (layout.lane / 4 == 0) shared.col[layout.warp_row][column] = {max, sum};
    }
  }

  static __device__ __forceinline__ void hardest(Shared& shared, typename Layout::Scores& s,
                                                 const Layout& layout, const TileFacts& facts) {
    const TileConditions<Layout>& tile = shared.conditions;
#pragma unroll
    for (int r = 0; r < Layout::kLaneRows; ++r) {
      const int row = layout.row(r);
      const float limit = tile.row_limit[row];
      const int positive = facts.positive_step(layout, row);
      float best = -infinity();
      int where = kWidth;
#pragma unroll
      for (int c = 0; c < Layout::kLaneColumns; ++c) {
        if (c % kChunk == 0) forget_loads();
        const int column = layout.column(c);
        const float v = Layout::at(s, r, c);
        // Columns ascend, and NaN is not larger than anything.
        if (v > best && tile.col_mark[column] != 0.0f && v <= limit &&
            Layout::column_step(c) != positive) {
          best = v;
          where = column;
        }
      }
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, best, bit);
        const int other_where = __shfl_xor_sync(kAllLanes, where, bit);
        if (other > best || (other == best && other_where < where)) {
          best = other;
          where = other_where;
        }
      }
      if (layout.lane % 4 == 0) {
        shared.hard[layout.warp_column][row] = best;
        shared.hard_index[layout.warp_column][row] = where;
      }
    }
  }

  static __device__ __forceinline__ void write(const Shared& shared,
                                               const ContrastiveScoresCuda& scores,
                                               const ContrastivePartialsCuda& out, int row0,
                                               int col0, int thread) {
    for (int r = thread; r < kHeight && row0 + r < scores.rows; r += Layout::kThreads) {
      PartialSum sum = shared.row[0][r];
#pragma unroll
      for (int w = 1; w < Layout::kWarpColumns; ++w) sum = merge(sum, shared.row[w][r]);
      const std::int64_t slot = col0 / kWidth * scores.rows + row0 + r;
      out.row[slot] = sum;
      if (out.hard == nullptr) continue;
      float best = shared.hard[0][r];
      int where = shared.hard_index[0][r];
#pragma unroll
      for (int w = 1; w < Layout::kWarpColumns; ++w) {
        if (shared.hard[w][r] > best) {  // a tie stays with the lower columns
          best = shared.hard[w][r];
          where = shared.hard_index[w][r];
        }
      }
      out.hard[slot] = best;
      out.hard_index[slot] = where < kWidth ? col0 + where : -1;
    }
    if (out.col == nullptr) return;
    for (int c = thread; c < kWidth && col0 + c < scores.columns; c += Layout::kThreads) {
      PartialSum sum = shared.col[0][c];
#pragma unroll
      for (int w = 1; w < Layout::kWarpRows; ++w) sum = merge(sum, shared.col[w][c]);
      out.col[row0 / kHeight * scores.columns + col0 + c] = sum;
    }
  }
};

}  // namespace ume::cuda
