// Epilogue of the contrastive loss's backward: the factor u of the gradient. With scores s,
//
//   u[i, j] = q_inv[i] p_inv[j] (g_row[i] exp(s[i, j] - row_lse[i])  if (i, j) counts by rows
//                              + g_col[j] exp(s[i, j] - col_lse[j])  if it does by columns
//                              + g_pos[i]                            if it is a positive)
//
// so that the gradient of q is scale u p, that of p scale u^T q, and that of the scale the sum of q
// times u p.
#pragma once

#include "ume/cuda/epilogue_score.cuh"

namespace ume::cuda {

// Among the four lanes of a row: in, lane q holds the q-th word of blocks w[0 … 3]; out, all four
// words of block q. Word by word a quad would store 16 bytes side by side, like this it stores 64.
__device__ __forceinline__ void transpose_quad(std::uint32_t (&w)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const std::uint32_t give = upper ? w[i] : w[i + bit];
      const std::uint32_t got = __shfl_xor_sync(kAllLanes, give, bit);
      w[i] = upper ? got : w[i];
      w[i + bit] = upper ? w[i + bit] : got;
    }
  }
}

// Element is the type of u. Per tile: load(), one barrier, tile(), and one barrier before the next
// load().
template <class Layout, typename Element>
struct GradientEpilogue {
  static constexpr int kHeight = Layout::kHeight, kWidth = Layout::kWidth;

  struct Shared {
    TileConditions<Layout> conditions;
    float row_unit[kHeight];  // q_inv
    float row_shift[kHeight], row_grad[kHeight], pos_grad[kHeight];
    float col_shift[kWidth], col_grad[kWidth];
  };

  static __device__ __forceinline__ void load(Shared& shared, const ContrastiveScoresCuda& scores,
                                              const ContrastiveGradientsCuda& gradients, int row0,
                                              int col0, int thread) {
    // Marks are added to exponents here: 2^-inf is 0 even where 2^exponent overflows.
    shared.conditions.load(scores, row0, col0, thread, 0.0f, -infinity());
    for (int r = thread; r < kHeight; r += Layout::kThreads) {
      const std::int64_t row = static_cast<std::int64_t>(row0) + r;
      const bool inside = row < scores.rows;
      const float lse = inside ? gradients.row_lse[row] : -infinity();
      shared.row_unit[r] = inside && scores.q_inv != nullptr ? scores.q_inv[row] : 1.0f;
      shared.row_shift[r] = shift_of(lse);
      shared.row_grad[r] = grad_of(lse, inside ? gradients.g_row[row] : 0.0f);
      shared.pos_grad[r] = inside ? gradients.g_pos[row] : 0.0f;
    }
    for (int c = thread; c < kWidth; c += Layout::kThreads) {
      const std::int64_t column = static_cast<std::int64_t>(col0) + c;
      const bool inside = gradients.col_lse != nullptr && column < scores.columns;
      const float lse = inside ? gradients.col_lse[column] : -infinity();
      shared.col_shift[c] = shift_of(lse);
      shared.col_grad[c] = grad_of(lse, inside ? gradients.g_col[column] : 0.0f);
    }
  }

  static __device__ __forceinline__ void tile(const Shared& shared,
                                              const ContrastiveScoresCuda& scores,
                                              const ContrastiveGradientsCuda& gradients,
                                              typename Layout::Scores& s, int row0, int col0,
                                              int thread) {
    const Layout layout(thread);
    const TileFacts facts = TileFacts::of<Layout>(scores, row0, col0);
    if (facts.general) {
      factors<true>(shared, scores, gradients, s, layout, facts, row0, col0);
    } else {
      factors<false>(shared, scores, gradients, s, layout, facts, row0, col0);
    }
  }

 private:
  // A row or column without pairs (lse -inf) adds nothing, whatever its gradient is.
  static __device__ __forceinline__ float shift_of(float lse) {
    return lse == -infinity() ? -infinity() : -lse * kLog2E;
  }
  static __device__ __forceinline__ float grad_of(float lse, float grad) {
    return lse == -infinity() ? 0.0f : grad;
  }

  template <bool kGeneral>
  static __device__ __forceinline__ void factors(const Shared& shared,
                                                 const ContrastiveScoresCuda& scores,
                                                 const ContrastiveGradientsCuda& gradients,
                                                 typename Layout::Scores& s, const Layout& layout,
                                                 const TileFacts& facts, int row0, int col0) {
    const TileConditions<Layout>& tile = shared.conditions;
    Element* const u = static_cast<Element*>(gradients.u);
#pragma unroll
    for (int r = 0; r < Layout::kLaneRows; ++r) {
      forget_loads();
      const int row = layout.row(r);
      const float factor = tile.row_factor[row], mark = tile.row_mark[row];
      const float unit = shared.row_unit[row];
      const float shift = shared.row_shift[row], grad = shared.row_grad[row];
      const float limit = kGeneral ? tile.row_limit[row] : 0.0f;
      const float pos_grad = kGeneral ? shared.pos_grad[row] : 0.0f;
      const std::int32_t group = kGeneral ? tile.row_group[row] : 0;
      const int positive = facts.positive_step(layout, row);
#pragma unroll
      for (int quarter = 0; quarter < Layout::kLaneColumns; quarter += 8) {
        std::uint32_t words[4];
        const std::uint32_t ignored =
            kGeneral ? ignored_steps(tile, facts, layout, row, quarter) : 0;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float pair[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = quarter + n * 2 + e;
            const int column = layout.column(c);
            const float v = Layout::at(s, r, c) * factor * tile.col_factor[column];
            float by_row = fmaf(v, kLog2E, shift) + tile.col_mark[column];
            float by_col = fmaf(v, kLog2E, shared.col_shift[column]) + mark;
            bool is_positive = false;
            if constexpr (kGeneral) {
              is_positive = Layout::column_step(c) == positive;
              const bool out = group != tile.col_group[column] ||
                               (ignored >> Layout::column_step(c % 8) & 1u) != 0;
              if (out || (v > limit && !is_positive)) by_row = -infinity();
              if (out || (v > tile.col_limit[column] && !is_positive)) by_col = -infinity();
            }
            float t = fmaf(grad, exp2_fast(by_row), shared.col_grad[column] * exp2_fast(by_col));
            if (is_positive) t += pos_grad;
            pair[e] = t * unit * tile.col_factor[column];
          }
          words[n] = pack<Element>(pair[0], pair[1]);
        }
        transpose_quad(words, layout.lane);
        const int first = layout.warp_column * Layout::kColumnBlocks * 8 + quarter * 4 +
                          layout.lane % 4 * 8;
        if (row0 + row < scores.rows && col0 + first < gradients.u_stride) {
          store_chunk(u + (row0 + row) * gradients.u_stride + col0 + first, words);
        }
      }
    }
  }

  static __device__ __forceinline__ void store_chunk(Element* at, const std::uint32_t (&w)[4]) {
    *reinterpret_cast<uint4*>(at) = make_uint4(w[0], w[1], w[2], w[3]);
  }
};

}  // namespace ume::cuda
