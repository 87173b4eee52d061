// Row and column log-sum-exp of a score matrix that is never stored, and their gradients, on the
// CPU. The definition is ume_kernels/contrastive_loss/blocked.py.
#pragma once

#include <cstdint>

#include "ume/cpu_features.h"
#include "ume/element.h"

namespace ume {

// Which pairs (i, j) count. The positive of row i is column i + offset; limits do not drop it.
struct ContrastivePairs {
  std::int64_t offset;
  const std::uint8_t* row_mask;      // [N] or nullptr
  const std::uint8_t* col_mask;      // [M] or nullptr
  const std::int32_t* row_group;     // [N] or nullptr; together with col_group
  const std::int32_t* col_group;     // [M] or nullptr
  const std::int64_t* ignore_start;  // [N + 1] or nullptr; together with ignore_col
  const std::int32_t* ignore_col;    // [E], ascending within a row
  const float* row_limit;            // [N] or nullptr: larger scores of row i do not count
  const float* col_limit;            // [M] or nullptr: larger scores of column j do not count
};

// s[i, j] = scale * <q_i, p_j> * q_inv[i] * p_inv[j], in float32.
struct ContrastiveScores {
  MatrixView q;        // [N, D]
  MatrixView p;        // [M, D], of the same element type
  const float* q_inv;  // [N] or nullptr for 1
  const float* p_inv;  // [M] or nullptr for 1
  float scale;
  ContrastivePairs pairs;
};

struct ContrastiveForward {
  float* row_lse;            // [N]
  float* col_lse;            // [M] or nullptr: rows only
  float* pos;                // [N]
  float* hard;               // [N] or nullptr
  std::int64_t* hard_index;  // [N], with hard
};

// g_*: gradients of the loss by row_lse, col_lse and pos. Those of q and p are bf16 for bf16
// inputs, else fp32; those of normalised inputs (q_inv given) are projected: q_inv is 1 / |q|.
// dscale sums to the gradient of the scale.
struct ContrastiveBackward {
  const float* row_lse;  // [N]
  const float* col_lse;  // [M] or nullptr
  const float* g_row;    // [N]
  const float* g_col;    // [M] or nullptr, with col_lse
  const float* g_pos;    // [N]
  void* dq;              // [N, D] contiguous
  float* dp_sum;         // [M, dp_columns] zeroed; receives sum_i u[i, j] q_i
  float* dscale;         // [N]
};

// Columns of dp_sum: D rounded up to whole panels of the engine that serves `element` on `isa`.
std::int64_t contrastive_dp_columns(Element element, std::int64_t d, Isa isa);

// Results do not depend on `threads`.
void contrastive_forward(const ContrastiveScores& scores, const ContrastiveForward& out,
                         int threads, Isa isa);
void contrastive_backward(const ContrastiveScores& scores, const ContrastiveBackward& out,
                          int threads, Isa isa);

// dp[j] = scale (dp_sum[j] - p_j p_inv[j]^2 <p_j, dp_sum[j]>), contiguous; the projection only with
// p_inv.
// A step of its own, so that the caller allocates dp after the backward's scratch is gone. dp may
// be dp_sum where both are fp32 and dp_columns is D.
void contrastive_finish(const ContrastiveScores& scores, const float* dp_sum, void* dp,
                        int threads, Isa isa);

}  // namespace ume
