// Row and column log-sum-exp of a score matrix that is never stored, and the factor of its
// gradients, on a CUDA device. The definition is ume_kernels/contrastive_loss/blocked.py.
//
// A call covers a strip of rows against all columns; a strip is a problem of its own whose row
// pointers begin at its first row and whose offset is larger by that row.
#pragma once

#include <cstdint>

#include "ume/contrastive_loss.h"

namespace ume {

// s[i, j] = scale * <q_i, p_j> * q_inv[i] * p_inv[j], accumulated in fp32. All addresses are on the
// device; q and p are aligned to 16 bytes, depth and both strides are multiples of 8.
struct ContrastiveScoresCuda {
  const void* q;    // [rows, depth]
  const void* p;    // [columns, depth]
  Element element;  // of q and p: kFloat16 or kBFloat16
  std::int64_t rows, columns, depth;
  std::int64_t q_stride, p_stride;  // in elements
  const float* q_inv;               // [rows] or nullptr for 1
  const float* p_inv;               // [columns] or nullptr for 1
  const float* scale;               // one number
  ContrastivePairs pairs;
};

// The sum of exp(s) over some pairs is sum * exp(max); no pair at all is {-inf, 0}.
struct alignas(8) PartialSum {
  float max, sum;
};

// What the tiles of one strip leave behind; every slot is written. Tile heights and widths are
// those of the kernel that ran.
struct ContrastivePartialsCuda {
  PartialSum* row;           // [column tiles, rows]
  PartialSum* col;           // [row tiles, columns] or nullptr: rows only
  float* pos;                // [rows]; slots of positives that do not exist are left alone
  float* hard;               // [column tiles, rows] or nullptr
  std::int32_t* hard_index;  // [column tiles, rows], with hard; -1 for none
};

// scale u[i, j] = d loss / d <q_i, p_j> for gradients g_* of the loss by row_lse, col_lse and pos.
struct ContrastiveGradientsCuda {
  const float* row_lse;   // [rows]
  const float* col_lse;   // [columns] or nullptr
  const float* g_row;     // [rows]
  const float* g_col;     // [columns], with col_lse
  const float* g_pos;     // [rows]
  void* u;                // [rows, u_stride], of the element type of q; columns past the last of p
  std::int64_t u_stride;  // are unspecified. Aligned to 16 bytes, stride a multiple of 8
};

// Results of a strip: row_lse and hard are final, the columns' sums continue those of the strips
// before it (initially {-inf, 0}).
struct ContrastiveForwardCuda {
  float* row_lse;            // [rows]
  PartialSum* col;           // [columns] or nullptr
  float* pos;                // [rows], -inf on entry
  float* hard;               // [rows] or nullptr
  std::int64_t* hard_index;  // [rows], with hard
  void* workspace;           // contrastive_workspace_cuda() bytes, aligned to 16
};

// Bytes of scratch that the forward of a strip needs on the current device.
std::int64_t contrastive_workspace_cuda(std::int64_t rows, std::int64_t columns, bool with_columns,
                                        bool with_hardest);

// All launches go to `stream` (a cudaStream_t) of the current device and return at once.
// std::runtime_error: a launch failed; it names the kernel and CUDA's reason.
void contrastive_forward_cuda(const ContrastiveScoresCuda& scores,
                              const ContrastiveForwardCuda& out, void* stream);
void contrastive_gradient_cuda(const ContrastiveScoresCuda& scores,
                               const ContrastiveGradientsCuda& gradients, void* stream);
// lse[i] = max + log(sum) of n sums.
void contrastive_finish_columns_cuda(const PartialSum* sums, float* lse, std::int64_t n,
                                     void* stream);

// The tile kernels of one generation of GPUs. *_tile_height, *_tile_width: what partial sums cover.
int contrastive_tile_height_sm80();
int contrastive_tile_width_sm80();
void contrastive_forward_tiles_sm80(const ContrastiveScoresCuda& scores,
                                    const ContrastivePartialsCuda& partials, void* stream);
void contrastive_gradient_tiles_sm80(const ContrastiveScoresCuda& scores,
                                     const ContrastiveGradientsCuda& gradients, void* stream);
int contrastive_tile_height_sm90();
int contrastive_tile_width_sm90();
void contrastive_forward_tiles_sm90(const ContrastiveScoresCuda& scores,
                                    const ContrastivePartialsCuda& partials, void* stream);
void contrastive_gradient_tiles_sm90(const ContrastiveScoresCuda& scores,
                                     const ContrastiveGradientsCuda& gradients, void* stream);

}  // namespace ume
