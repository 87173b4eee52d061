// Backward of the contrastive loss on the CPU: every tile of scores is computed once more, turned
// into weights u, and multiplied with both inputs while it is in the cache.
//
//     u[i, j] = (g_row[i] e^(s - row_lse[i]) + g_col[j] e^(s - col_lse[j]) + g_pos[i] [j = i + o])
//               * q_inv[i] * p_inv[j]
//     dq = scale u p,   dp = scale u^T q,   dscale = sum_i <q_i, (u p)_i>
//
// The scale is applied at the end, so that a scale of 0 has a gradient too.
//
// Strips of rows are the outer loop, so the gradient of a strip of q is finished with it; that of
// p is summed over the strips, in their order. Inside a block of strip x columns three parallel
// steps follow each other: weights, their product with p, their transpose's product with q.
#include "contrastive_tile.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ume {
namespace {

using i64 = std::int64_t;
using u16 = std::uint16_t;

constexpr i64 kStripRows = 1024;
constexpr i64 kTileCols = 480;    // columns of a block, rounded up to whole panels
constexpr i64 kTileRows = 60;     // rows that one thread turns into weights at a time; even
constexpr i64 kProductRows = 60;  // rows of a gradient that one thread multiplies at a time

struct Scratch {
  ScratchBuffer<float> s, by_row, by_col;
  ScratchBuffer<std::uint32_t> staged;
};

class Backward {
 public:
  Backward(const ContrastiveScores& scores, const ContrastiveBackward& out, Isa isa)
      : scores_(scores),
        out_(out),
        tile_(scores, isa),
        engine_(tile_.engine()),
        ops_(tile_.rows()),
        n_(scores.q.rows),
        m_(scores.p.rows),
        d_(scores.q.columns) {
    strip_ = std::min(kStripRows, n_ + n_ % 2);
    block_ = tile_.whole_panels(std::min(kTileCols, m_));
    wide_ = tile_.whole_panels(d_);
    bf16_ = engine_.compute == Compute::kBFloat16;
  }

  void run(int threads) {
    const i64 lanes = engine_.lanes;
    const i64 strip_words = engine_.words(strip_), block_words = engine_.words(block_);
    ScratchBuffer<std::uint32_t> p_columns(block_ / lanes * tile_.panel_words());
    ScratchBuffer<std::uint32_t> p_matrix(wide_ * block_words), q_matrix(wide_ * strip_words);
    ScratchBuffer<float> dq(strip_ * wide_);
    // Weights by row, and for bf16 words a second copy whose words pair two rows: the transpose.
    ScratchBuffer<std::uint32_t> by_row(strip_ * block_words);
    ScratchBuffer<std::uint32_t> by_pair(bf16_ ? strip_words * block_ : 0);
    std::vector<float> column(block_), g_col(block_), col_lse(block_);
    std::vector<Scratch> scratch(threads);
    for (Scratch& own : scratch) {
      own.s.reserve(bf16_ ? kTileRows * block_ : 0);
      own.by_row.reserve(block_);
      own.by_col.reserve(block_);
      own.staged.reserve(tile_.staged_words(kTileRows));
    }
    for (i64 i0 = 0; i0 < n_; i0 += strip_) {
      const i64 rows = std::min(strip_, n_ - i0);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
      {
#ifdef _OPENMP
        Scratch& own = scratch[omp_get_thread_num()];
#pragma omp for schedule(static)
#else
        Scratch& own = scratch[0];
#endif
        for (i64 panel = 0; panel < wide_ / lanes; ++panel)
          pack_matrix(q_matrix.data(), panel, scores_.q, i0, rows);
        for (i64 j0 = 0; j0 < m_; j0 += block_) {
          const i64 n = std::min(block_, m_ - j0);
          const i64 used = engine_.panels(n);
          const bool accumulate = j0 > 0;
#ifdef _OPENMP
#pragma omp for schedule(static) nowait
#endif
          for (i64 panel = 0; panel < used; ++panel)
            tile_.pack_panel(p_columns.data(), panel, j0, n);
#ifdef _OPENMP
#pragma omp for schedule(static) nowait
#endif
          for (i64 panel = 0; panel < wide_ / lanes; ++panel)
            pack_matrix(p_matrix.data(), panel, scores_.p, j0, n);
#ifdef _OPENMP
#pragma omp single
#endif
          prepare_columns(j0, n, column.data(), g_col.data(), col_lse.data());
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
          for (i64 r0 = 0; r0 < rows; r0 += kTileRows)
            weights(i0, r0, std::min(kTileRows, rows - r0), j0, n, p_columns.data(),
                    column.data(), g_col.data(), col_lse.data(), own, by_row.data(),
                    by_pair.data());
          const i64 row_words = engine_.words(n);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1) nowait
#endif
          for (i64 r0 = 0; r0 < rows; r0 += kProductRows)
            engine_.multiply(by_row.data() + r0 * block_words, block_words * 4, 4,
                             std::min(kProductRows, rows - r0), p_matrix.data(), row_words,
                             wide_ / lanes, dq.data() + r0 * wide_, wide_, accumulate);
          // The transpose: row j of it is word (k, j) of the weights, k over rows or their pairs.
          const std::uint32_t* transposed = bf16_ ? by_pair.data() : by_row.data();
          const i64 k_stride = (bf16_ ? block_ : block_words) * 4;
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
          for (i64 c0 = 0; c0 < n; c0 += kProductRows)
            engine_.multiply(transposed + c0, 4, k_stride, std::min(kProductRows, n - c0),
                             q_matrix.data(), engine_.words(rows), wide_ / lanes,
                             out_.dp_sum + (j0 + c0) * wide_, wide_, true);
        }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (i64 r = 0; r < rows; ++r) finish_row(i0 + r, dq.data() + r * wide_);
      }
    }
  }

 private:
  void pack_matrix(std::uint32_t* packed, i64 panel, const MatrixView& of, i64 first,
                   i64 rows) const {
    const i64 column = panel * engine_.lanes;
    MatrixView part = of;
    part.data = static_cast<const char*>(of.row(first)) + column * element_size(of.element);
    part.rows = rows;
    part.columns = std::min(engine_.lanes, d_ - column);
    engine_.pack_matrix(packed + column * engine_.words(rows), part);
  }

  void prepare_columns(i64 j0, i64 n, float* column, float* g_col, float* col_lse) const {
    tile_.column_factors(column, j0, n);
    for (i64 j = 0; j < n; ++j) {
      // a column without pairs has no gradient; 0 stands for its -inf
      const bool none = !out_.col_lse || out_.col_lse[j0 + j] == kNone;
      col_lse[j] = none ? 0.0f : out_.col_lse[j0 + j];
      g_col[j] = none ? 0.0f : out_.g_col[j0 + j];
    }
  }

  // Weights of rows i0 + r0 … against columns j0 …, stored as words for both products.
  void weights(i64 i0, i64 r0, i64 m, i64 j0, i64 n, const std::uint32_t* panels,
               const float* column, const float* g_col, const float* col_lse, Scratch& own,
               std::uint32_t* by_row, std::uint32_t* by_pair) const {
    const i64 first = i0 + r0, lds = block_;
    const i64 block_words = engine_.words(block_);
    // fp32 weights are words already
    float* s = bf16_ ? own.s.data() : reinterpret_cast<float*>(by_row) + r0 * block_;
    if (tile_.apart(first, m, j0, n)) {
      std::fill(s, s + m * lds, 0.0f);
    } else {
      tile_.score(first, m, panels, n, column, own.staged.data(), s, lds);
      float shift;
      const bool shared =
          tile_.plain() && out_.col_lse && shared_shift(first, m, col_lse, n, shift);
      if (shared) {
        float* scaled = own.by_col.data();
        for (i64 j = 0; j < n; ++j) scaled[j] = g_col[j] * std::exp(shift - col_lse[j]);
      }
      for (i64 r = 0; r < m; ++r) {
        float* row = s + r * lds;
        const i64 i = first + r;
        const float lse = out_.row_lse[i];
        const float g = lse == kNone ? 0.0f : out_.g_row[i], by = lse == kNone ? 0.0f : lse;
        if (shared)
          ops_.weights(row, shift, g * std::exp(shift - by), own.by_col.data(), n);
        else
          separate(i, j0, n, row, by, g, g_col, col_lse, own);
        const i64 positive = i + scores_.pairs.offset - j0;
        if (positive >= 0 && positive < n) row[positive] += out_.g_pos[i];
        ops_.scale(row, column, scores_.q_inv ? scores_.q_inv[i] : 1.0f, n);
      }
    }
    if (!bf16_) return;
    for (i64 r = 0; r < m; ++r) {
      u16* line = reinterpret_cast<u16*>(by_row + (r0 + r) * block_words);
      ops_.to_bf16(line, s + r * lds, n);
      if (n % 2) line[n] = 0;
    }
    std::fill(own.by_row.data(), own.by_row.data() + n, 0.0f);  // stands for a missing last row
    for (i64 r = 0; r < m; r += 2)
      ops_.to_bf16_pairs(reinterpret_cast<u16*>(by_pair + (r0 + r) / 2 * block_), s + r * lds,
                         r + 1 < m ? s + (r + 1) * lds : own.by_row.data(), n);
  }

  // One exponential serves both directions where all log-sum-exps of the tile are close: the
  // smallest is the reference, so that every weight that matters stays far from underflow.
  bool shared_shift(i64 first, i64 m, const float* col_lse, i64 n, float& shift) const {
    float low = -kNone, high = kNone;
    for (i64 r = 0; r < m; ++r) {
      low = std::min(low, out_.row_lse[first + r]);
      high = std::max(high, out_.row_lse[first + r]);
    }
    for (i64 j = 0; j < n; ++j) low = std::min(low, col_lse[j]), high = std::max(high, col_lse[j]);
    shift = low;
    return high - low < kSharedShift;
  }

  void separate(i64 i, i64 j0, i64 n, float* row, float lse, float g, const float* g_col,
                const float* col_lse, Scratch& own) const {
    const float* by_col = row;
    const bool columns = out_.col_lse != nullptr;
    if (columns || !tile_.plain()) {
      float* copy = own.by_col.data();
      if (tile_.plain()) {
        std::copy_n(row, n, copy);
      } else {
        tile_.select(i, j0, n, row, row, copy);
      }
      by_col = copy;
    }
    ops_.weights_row(row, lse, g, n);
    if (columns) ops_.weights_column(row, by_col, col_lse, g_col, n);
  }

  void finish_row(i64 i, float* gradient) const {
    float q_dot = 0.0f;
    const bool to_bf16 = scores_.q.element == Element::kBFloat16;
    const i64 bytes = d_ * (to_bf16 ? 2 : 4);
    contrastive_project(ops_, scores_.q, i, scores_.q_inv, scores_.scale, gradient, d_,
                        static_cast<char*>(out_.dq) + i * bytes, &q_dot);
    out_.dscale[i] = q_dot;
  }

  const ContrastiveScores& scores_;
  const ContrastiveBackward& out_;
  ContrastiveTile tile_;
  const TileEngine& engine_;
  const ContrastiveRowOps& ops_;
  i64 n_, m_, d_, strip_, block_, wide_;
  bool bf16_;
};

}  // namespace

std::int64_t contrastive_dp_columns(Element element, std::int64_t d, Isa isa) {
  const TileEngine& engine = tile_engine(compute_for(isa, element, element), isa);
  return engine.panels(d) * engine.lanes;
}

void contrastive_backward(const ContrastiveScores& scores, const ContrastiveBackward& out,
                          int threads, Isa isa) {
  Backward(scores, out, isa).run(std::max(threads, 1));
}

void contrastive_finish(const ContrastiveScores& scores, const float* dp_sum, void* dp,
                        int threads, Isa isa) {
  const ContrastiveRowOps& ops = contrastive_row_ops(isa);
  const i64 d = scores.p.columns, wide = contrastive_dp_columns(scores.p.element, d, isa);
  const i64 bytes = d * (scores.p.element == Element::kBFloat16 ? 2 : 4);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#endif
  for (i64 j = 0; j < scores.p.rows; ++j) {
    float dot;
    contrastive_project(ops, scores.p, j, scores.p_inv, scores.scale, dp_sum + j * wide, d,
                        static_cast<char*>(dp) + j * bytes, &dot);
  }
}

}  // namespace ume
