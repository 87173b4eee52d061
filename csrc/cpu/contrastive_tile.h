// What the forward and the backward of the contrastive loss share: blocks of scores from the tile
// engine and the rule which of their pairs count.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "contrastive_rows.h"
#include "ume/contrastive_loss.h"
#include "ume/tile_engine.h"

namespace ume {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Spread of the shifts inside a tile up to which one exponential serves rows and columns: what is
// smaller than exp(-87) of the tile's reference is dropped, and that must not matter to any row.
constexpr float kSharedShift = 40.0f;

class ContrastiveTile {
 public:
  using i64 = std::int64_t;

  ContrastiveTile(const ContrastiveScores& scores, Isa isa)
      : scores_(scores),
        engine_(tile_engine(compute_for(isa, scores.q.element, scores.p.element), isa)),
        rows_(contrastive_row_ops(isa)),
        words_(engine_.words(scores.q.columns)),
        in_place_(engine_.reads_in_place(scores.q.element, scores.q.columns)) {
    const ContrastivePairs& p = scores.pairs;
    plain_ = !p.row_mask && !p.col_mask && !p.row_group && !p.ignore_start && !p.row_limit &&
             !p.col_limit;
  }

  const TileEngine& engine() const { return engine_; }
  const ContrastiveRowOps& rows() const { return rows_; }
  // Every pair counts in both directions.
  bool plain() const { return plain_; }
  // `columns` rounded up to whole panels.
  i64 whole_panels(i64 columns) const { return engine_.panels(columns) * engine_.lanes; }
  // Words of one packed panel of the columns of the score matrix.
  i64 panel_words() const { return engine_.lanes * words_; }
  // Words that m rows need where q cannot be read as it lies.
  i64 staged_words(i64 m) const { return in_place_ ? 0 : m * words_; }

  // Pack panel number `panel` of columns [j0, j0 + n).
  void pack_panel(std::uint32_t* panels, i64 panel, i64 j0, i64 n) const {
    MatrixView part = scores_.p;
    part.data = scores_.p.row(j0 + panel * engine_.lanes);
    part.rows = std::min(engine_.lanes, n - panel * engine_.lanes);
    engine_.pack_vectors(panels + panel * panel_words(), part);
  }

  // True if rows [i0, i0 + m) and columns [j0, j0 + n) have no group and no positive in common.
  bool apart(i64 i0, i64 m, i64 j0, i64 n) const {
    const ContrastivePairs& p = scores_.pairs;
    const i64 first = i0 + p.offset;
    if (!p.row_group || (first < j0 + n && j0 < first + m)) return false;
    const auto rows = std::minmax_element(p.row_group + i0, p.row_group + i0 + m);
    const auto cols = std::minmax_element(p.col_group + j0, p.col_group + j0 + n);
    return *rows.second < *cols.first || *cols.second < *rows.first;
  }

  // Scores of rows [i0, i0 + m) against n packed columns into s; its row stride lds holds whole
  // panels.
  void score(i64 i0, i64 m, const std::uint32_t* panels, i64 n, const float* column,
             std::uint32_t* staged, float* s, i64 lds) const {
    const void* a = scores_.q.row(i0);
    i64 stride = scores_.q.row_stride * element_size(scores_.q.element);
    if (!in_place_) {
      MatrixView part = scores_.q;
      part.data = a;
      part.rows = m;
      engine_.stage_rows(staged, part);
      a = staged;
      stride = words_ * static_cast<i64>(sizeof(std::uint32_t));
    }
    engine_.multiply(a, stride, sizeof(std::uint32_t), m, panels, words_, engine_.panels(n), s, lds,
                     false);
    for (i64 r = 0; r < m; ++r) rows_.scale(s + r * lds, column, row_factor(i0 + r), n);
  }

  // scale * q_inv[i]
  float row_factor(i64 i) const {
    return scores_.scale * (scores_.q_inv ? scores_.q_inv[i] : 1.0f);
  }

  // column[j] = p_inv[j0 + j]
  void column_factors(float* column, i64 j0, i64 n) const {
    for (i64 j = 0; j < n; ++j) column[j] = scores_.p_inv ? scores_.p_inv[j0 + j] : 1.0f;
  }

  // by_row[j], by_col[j]: s[j] where pair (i, j0 + j) counts in that direction, else -inf, whatever
  // s[j] is. by_row may be s.
  void select(i64 i, i64 j0, i64 n, const float* s, float* by_row, float* by_col) const {
    const ContrastivePairs& p = scores_.pairs;
    const bool row_counts = !p.row_mask || p.row_mask[i];
    const float row_limit = p.row_limit ? p.row_limit[i] : -kNone;
    const i64 positive = i + p.offset - j0;
    for (i64 j = 0; j < n; ++j) {
      const bool together = !p.row_group || p.row_group[i] == p.col_group[j0 + j];
      // "not above", so that a NaN score stays in and shows in the result
      const bool below_row = !(s[j] > row_limit) || j == positive;
      const bool below_col = !p.col_limit || !(s[j] > p.col_limit[j0 + j]) || j == positive;
      const bool col_counts = !p.col_mask || p.col_mask[j0 + j];
      by_col[j] = together && row_counts && below_col ? s[j] : kNone;
      by_row[j] = together && col_counts && below_row ? s[j] : kNone;
    }
    if (p.ignore_start) {
      const std::int32_t* last = p.ignore_col + p.ignore_start[i + 1];
      const std::int32_t* entry = std::lower_bound(p.ignore_col + p.ignore_start[i], last, j0);
      for (; entry != last && *entry < j0 + n; ++entry)
        by_row[*entry - j0] = by_col[*entry - j0] = kNone;
    }
  }

 private:
  const ContrastiveScores& scores_;
  const TileEngine& engine_;
  const ContrastiveRowOps& rows_;
  i64 words_;
  bool in_place_, plain_;
};

// out = scale (g - x inv^2 <x, g>) for row `index` of x (scale g without inv), as bf16 for bf16
// rows, else fp32. g and out may be the same memory. *dot = <x, g>.
inline void contrastive_project(const ContrastiveRowOps& ops, const MatrixView& x,
                                std::int64_t index, const float* inv, float scale, const float* g,
                                std::int64_t d, void* out, float* dot) {
  const void* row = x.row(index);
  *dot = ops.dot(row, x.element, g, d);
  // A row shorter than the normalisation's bound was divided by that constant, not by its norm.
  const bool projected = inv && inv[index] < 1e12f;
  const float factor = projected ? -*dot * inv[index] * inv[index] * scale : 0.0f;
  ops.project(out, row, x.element, g, scale, factor, d);
}

}  // namespace ume
