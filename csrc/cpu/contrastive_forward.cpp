// Forward of the contrastive loss on the CPU: one pass over tiles of scores gives the log-sum-exp
// of every row and every column.
//
// Column blocks are the outer loop: a block is packed once and all row tiles pass over it, so the
// columns of a block are finished with it. Inside, row tiles are shared among the threads; each
// keeps its columns' part to itself, and the parts are added in the order of the tiles.
#include "contrastive_tile.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ume {
namespace {

using i64 = std::int64_t;

constexpr i64 kTileRows = 120;  // rows of a tile: its scores stay in the L2 cache
constexpr i64 kTileCols = 384;  // columns of a block, rounded up to whole panels

// A log-sum-exp under way: sum * exp(top).
struct Partial {
  float top = kNone, sum = 0.0f;

  void merge(float other_top, float other_sum) {
    if (other_top > top) {
      sum = (top == kNone ? sum : sum * std::exp(top - other_top)) + other_sum;
      top = other_top;
    } else {
      // both -inf: the sums are 0, or NaN when a score was
      sum += other_top == kNone ? other_sum : other_sum * std::exp(other_top - top);
    }
  }
  float lse() const { return top == kNone ? (sum == 0.0f ? kNone : sum) : top + std::log(sum); }
};

struct Scratch {
  ScratchBuffer<float> s, by_row, by_col, row_top;
  ScratchBuffer<std::uint32_t> staged;
};

class Forward {
 public:
  Forward(const ContrastiveScores& scores, const ContrastiveForward& out, Isa isa)
      : scores_(scores), out_(out), tile_(scores, isa), ops_(tile_.rows()) {
    block_ = tile_.whole_panels(std::min(kTileCols, scores.p.rows));
    tiles_ = (scores.q.rows + kTileRows - 1) / kTileRows;
  }

  void run(int threads) {
    const i64 lanes = tile_.engine().lanes;
    const bool columns = out_.col_lse != nullptr;
    ScratchBuffer<std::uint32_t> panels(block_ / lanes * tile_.panel_words());
    std::vector<float> column(block_), tops(columns ? tiles_ * block_ : 0),
        sums(columns ? tiles_ * block_ : 0);
    std::vector<Partial> rows(scores_.q.rows);
    std::vector<Scratch> scratch(threads);
    for (Scratch& own : scratch) prepare(own);
    std::fill(out_.pos, out_.pos + scores_.q.rows, kNone);
    if (out_.hard) {
      std::fill(out_.hard, out_.hard + scores_.q.rows, kNone);
      std::fill(out_.hard_index, out_.hard_index + scores_.q.rows, i64{-1});
    }
    for (i64 j0 = 0; j0 < scores_.p.rows; j0 += block_) {
      const i64 n = std::min(block_, scores_.p.rows - j0);
      const i64 used = (n + lanes - 1) / lanes;
      tile_.column_factors(column.data(), j0, n);
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
        for (i64 panel = 0; panel < used; ++panel)
          tile_.pack_panel(panels.data(), panel, j0, n);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (i64 t = 0; t < tiles_; ++t)
          tile_stats(t, j0, n, used, panels.data(), column.data(), own, rows.data(),
                     columns ? tops.data() + t * block_ : nullptr,
                     columns ? sums.data() + t * block_ : nullptr);
        if (columns) {
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
          for (i64 j = 0; j < n; ++j) {
            Partial whole;
            for (i64 t = 0; t < tiles_; ++t)
              whole.merge(tops[t * block_ + j], sums[t * block_ + j]);
            out_.col_lse[j0 + j] = whole.lse();
          }
        }
      }
    }
    for (i64 i = 0; i < scores_.q.rows; ++i) out_.row_lse[i] = rows[i].lse();
  }

 private:
  void prepare(Scratch& own) const {
    own.s.reserve(kTileRows * block_);
    own.row_top.reserve(kTileRows);
    own.by_row.reserve(block_);
    own.by_col.reserve(block_);
    own.staged.reserve(tile_.staged_words(kTileRows));
  }

  // Rows of tile t against columns [j0, j0 + n): updates `rows`, sets tops[n] and sums[n].
  void tile_stats(i64 t, i64 j0, i64 n, i64 used, const std::uint32_t* panels,
                  const float* column, Scratch& own, Partial* rows, float* tops,
                  float* sums) const {
    const i64 i0 = t * kTileRows, m = std::min(kTileRows, scores_.q.rows - i0);
    const i64 lds = used * tile_.engine().lanes;
    if (tops) {
      std::fill(tops, tops + n, kNone);
      std::fill(sums, sums + n, 0.0f);
    }
    if (tile_.apart(i0, m, j0, n)) return;
    float* s = own.s.data();
    tile_.score(i0, m, panels, n, column, own.staged.data(), s, lds);
    for (i64 r = 0; r < m; ++r) {
      float* row = s + r * lds;
      const i64 positive = i0 + r + scores_.pairs.offset - j0;
      if (positive >= 0 && positive < n) out_.pos[i0 + r] = row[positive];
      const float* by_row = row;
      const float* by_col = row;
      if (!tile_.plain()) {
        masked(i0 + r, j0, n, row, own);
        by_row = own.by_row.data();
        by_col = own.by_col.data();
      }
      own.row_top.data()[r] = ops_.max(by_row, n);
      if (tops) ops_.max_into(tops, by_col, n);
      if (out_.hard) hardest(i0 + r, j0, n, by_row, own.row_top.data()[r]);
    }
    if (tops && tile_.plain() && shared(own.row_top.data(), m, tops, n, sums, s, lds, rows + i0))
      return;
    for (i64 r = 0; r < m; ++r) {
      float* row = s + r * lds;
      const float* by_row = row;
      const float* by_col = row;
      if (!tile_.plain()) {
        masked(i0 + r, j0, n, row, own);
        by_row = own.by_row.data();
        by_col = own.by_col.data();
      }
      const float shift = own.row_top.data()[r];
      rows[i0 + r].merge(shift, ops_.exp_sum(by_row, shift == kNone ? 0.0f : shift, n));
      if (tops) {
        // a column without a pair so far: its scores are -inf (or NaN), any finite shift does
        float* shifts = own.by_row.data();
        for (i64 j = 0; j < n; ++j) shifts[j] = tops[j] == kNone ? 0.0f : tops[j];
        ops_.exp_into(sums, by_col, shifts, n);
      }
    }
  }

  // One exponential per score where the tops of all rows and columns are close enough.
  bool shared(const float* row_top, i64 m, float* tops, i64 n, float* sums, const float* s,
              i64 lds, Partial* rows) const {
    float high = kNone, low = -kNone;
    for (i64 r = 0; r < m; ++r) high = std::max(high, row_top[r]), low = std::min(low, row_top[r]);
    for (i64 j = 0; j < n; ++j) low = std::min(low, tops[j]);
    if (!(high - low < kSharedShift)) return false;
    for (i64 r = 0; r < m; ++r)
      rows[r].merge(high, ops_.exp_both(sums, s + r * lds, high, n));
    std::fill(tops, tops + n, high);
    return true;
  }

  // own.by_row, own.by_col: the scores of row i that count in either direction, else -inf.
  void masked(i64 i, i64 j0, i64 n, const float* s, Scratch& own) const {
    tile_.select(i, j0, n, s, own.by_row.data(), own.by_col.data());
  }

  void hardest(i64 i, i64 j0, i64 n, const float* by_row, float top) const {
    if (!(top > out_.hard[i])) return;
    const i64 positive = i + scores_.pairs.offset - j0;
    for (i64 j = 0; j < n; ++j)
      if (j != positive && by_row[j] > out_.hard[i]) {
        out_.hard[i] = by_row[j];
        out_.hard_index[i] = j0 + j;
      }
  }

  const ContrastiveScores& scores_;
  const ContrastiveForward& out_;
  ContrastiveTile tile_;
  const ContrastiveRowOps& ops_;
  i64 block_, tiles_;
};

}  // namespace

void contrastive_forward(const ContrastiveScores& scores, const ContrastiveForward& out,
                         int threads, Isa isa) {
  Forward(scores, out, isa).run(std::max(threads, 1));
}

}  // namespace ume
