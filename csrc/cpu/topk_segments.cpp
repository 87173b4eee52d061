// Top-k within a list of candidates per query.
//
// Each query fills one column of an otherwise zero panel, and the candidates of its list are
// gathered into rows: the products run in the same order as in the scan of a whole corpus, so the
// scores have the same bits. Time goes to fetching scattered rows; prefetching them did not help on a
// two-core Zen 4.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "topk_select.h"
#include "ume/similarity_topk.h"
#include "ume/tile_engine.h"

namespace ume {
namespace {

using i64 = std::int64_t;
using u32 = std::uint32_t;

constexpr i64 kRows = 48;  // gathered at a time; whole register tiles of most engines

struct Worker {
  ScratchBuffer<u32> panel, query, rows;
  ScratchBuffer<float> scores;
  std::vector<i64> keys;
  bool nan = false, outside = false;
};

class SegmentScanner {
 public:
  SegmentScanner(const TopkSegments& segments, int threads, Isa isa)
      : segments_(segments),
        q_(segments.operands.q),
        c_(segments.operands.c),
        engine_(tile_engine(compute_for(isa, q_.element, c_.element), isa)),
        words_(engine_.words(q_.columns)),
        threads_(static_cast<int>(std::min<i64>(threads, q_.rows))),
        workers_(static_cast<std::size_t>(threads_)) {
    i64 longest = 0;
    for (i64 i = 0; i < q_.rows; ++i)
      longest = std::max(longest, segments.offsets[i + 1] - segments.offsets[i]);
    for (Worker& own : workers_) {
      const i64 panel_words = engine_.lanes * words_;
      std::fill_n(own.panel.reserve(panel_words), panel_words, 0u);
      own.query.reserve(words_);
      own.rows.reserve(kRows * words_);
      own.scores.reserve(kRows * engine_.narrow_lanes);
      own.keys.resize(static_cast<std::size_t>(topk_capacity(segments.k, longest)));
    }
  }

  bool run() {
    std::atomic<i64> next{0};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    work(workers_[static_cast<std::size_t>(omp_get_thread_num())], next);
#else
    work(workers_[0], next);
#endif
    bool nan = false;
    for (const Worker& own : workers_) {
      if (own.outside) throw std::out_of_range("a segment names a row that c does not have");
      nan |= own.nan;
    }
    return nan;
  }

 private:
  void work(Worker& own, std::atomic<i64>& next) const {
    for (i64 i; (i = next.fetch_add(1, std::memory_order_relaxed)) < q_.rows;) rank(own, i);
  }

  void rank(Worker& own, i64 i) const {
    MatrixView query = q_;
    query.data = q_.row(i);
    query.rows = 1;
    engine_.stage_rows(own.query.data(), query);
    for (i64 w = 0; w < words_; ++w) own.panel.data()[w * engine_.lanes] = own.query.data()[w];
    const float q_inv = segments_.operands.q_inv ? segments_.operands.q_inv[i] : 1.0f;
    const i64 end = segments_.offsets[i + 1];
    const i64 capacity = static_cast<i64>(own.keys.size());
    i64 count = 0;
    // Lists come in any order, so an equal score may belong to a lower index: no threshold.
    for (i64 e = segments_.offsets[i]; e < end; e += kRows) {
      const i64 m = std::min(kRows, end - e);
      if (!gather(own, segments_.rows + e, m)) return;
      engine_.multiply_narrow(own.rows.data(), words_ * 4, 4, m, own.panel.data(), words_,
                              own.scores.data(), engine_.narrow_lanes, false);
      for (i64 r = 0; r < m; ++r) {
        const i64 row = segments_.rows[e + r];
        float s = own.scores.data()[r * engine_.narrow_lanes];
        if (segments_.operands.q_inv || segments_.operands.c_inv)
          s = s * q_inv * (segments_.operands.c_inv ? segments_.operands.c_inv[row] : 1.0f);
        if (s != s) {
          own.nan = true;
        } else {
          if (count == capacity) count = topk_compact(own.keys.data(), count, segments_.k);
          own.keys[static_cast<std::size_t>(count++)] = topk_key(s, segments_.first + row);
        }
      }
    }
    count = topk_compact(own.keys.data(), count, segments_.k);
    i64* keys = segments_.keys + i * segments_.k;
    std::copy_n(own.keys.data(), count, keys);
    std::fill(keys + count, keys + segments_.k, kEmptyKey);
  }

  // Rows of c side by side as rows of A; false if one does not exist.
  bool gather(Worker& own, const i64* rows, i64 m) const {
    MatrixView one = c_;
    one.rows = 1;
    for (i64 r = 0; r < m; ++r) {
      if (rows[r] < 0 || rows[r] >= c_.rows) {
        own.outside = true;
        return false;
      }
      one.data = c_.row(rows[r]);
      engine_.stage_rows(own.rows.data() + r * words_, one);
    }
    return true;
  }

  const TopkSegments& segments_;
  const MatrixView& q_;
  const MatrixView& c_;
  const TileEngine& engine_;
  const i64 words_;
  const int threads_;
  std::vector<Worker> workers_;
};

}  // namespace

bool similarity_topk_segments(const TopkSegments& segments, int threads, Isa isa) {
  if (segments.operands.q.columns != segments.operands.c.columns)
    throw std::invalid_argument("queries and candidates differ in length");
  if (segments.k < 1) throw std::invalid_argument("k must be at least 1");
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  if (segments.operands.q.rows == 0) return false;
  return SegmentScanner(segments, threads, isa).run();
}

}  // namespace ume
