// Top-k over a whole corpus: blocks of scores from the tile engine, a filter against each query's
// threshold, and rare appends to private lists.
//
// The queries are the packed operand, so that a row of scores belongs to one candidate and is
// compared with all thresholds at once, and the corpus is read where it lies. A single query
// is multiplied with candidates side by side instead. Keys are unique and totally ordered: the best k of the private lists are the same however blocks fell to threads.
#include "ume/similarity_topk.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "topk_dots.h"
#include "topk_filter.h"
#include "topk_select.h"
#include "ume/tile_engine.h"

namespace ume {
namespace {

using i64 = std::int64_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u8 = std::uint8_t;

constexpr i64 kMaxQueries = 256;     // packed at a time
constexpr i64 kMaxCandidates = 96;   // scored at a time; whole register tiles of every engine
constexpr i64 kStreamRows = 1024;    // the same for a single query, which reads them once
constexpr i64 kListBytes = 1 << 26;  // bound on the private lists, as long as a panel fits
constexpr float kAlways = std::numeric_limits<float>::quiet_NaN();
constexpr float kNever = std::numeric_limits<float>::infinity();

// What one thread owns.
struct Worker {
  ScratchBuffer<float> scores, threshold;
  ScratchBuffer<float> level;  // a single query's threshold, once per candidate
  ScratchBuffer<u32> staged;
  ScratchBuffer<i64> keys;    // [queries, capacity]
  ScratchBuffer<i64> merged;  // [k + capacity]
  std::vector<i64> counts;
  bool nan = false;
};

class Scanner {
 public:
  Scanner(const TopkScan& scan, int threads, Isa isa)
      : scan_(scan),
        q_(scan.operands.q),
        c_(scan.operands.c),
        engine_(tile_engine(compute_for(isa, q_.element, c_.element), isa)),
        filter_(topk_filter(isa)),
        dots_(q_.rows == 1 ? topk_dots(isa, engine_.compute) : nullptr),
        words_(engine_.words(q_.columns)),
        in_place_(engine_.reads_in_place(c_.element, c_.columns)),
        scaled_(scan.operands.q_inv || scan.operands.c_inv) {
    // Small blocks where large ones would leave threads idle.
    const i64 share = c_.rows / (4 * static_cast<i64>(threads));
    const i64 unit = dots_ != nullptr ? 2 * kDotRows : engine_.rows;  // chunks of the filter
    const i64 most = dots_ != nullptr && in_place_ ? kStreamRows : kMaxCandidates;
    block_ = std::clamp(share / unit * unit, unit, most);
    blocks_ = (c_.rows + block_ - 1) / block_;
    threads_ = static_cast<int>(std::min<i64>(threads, blocks_));
    capacity_ = topk_capacity(scan.k, c_.rows);
    const i64 fitting = kListBytes / (threads_ * capacity_ * static_cast<i64>(sizeof(i64)));
    queries_ = std::min(std::clamp(fitting / engine_.lanes * engine_.lanes, engine_.lanes,
                                   kMaxQueries), q_.rows);
    packed_.reserve(engine_.packed_words(queries_, q_.columns));
    width_ = row_width(engine_.panels(queries_) * engine_.lanes);
    q_inv_.reserve(width_);
    workers_ = std::vector<Worker>(static_cast<std::size_t>(threads_));
    for (Worker& own : workers_) {
      own.scores.reserve(block_ * width_);
      own.threshold.reserve(width_);
      own.level.reserve(block_);
      own.staged.reserve(in_place_ ? 0 : block_ * words_);
      own.keys.reserve(queries_ * capacity_);
      own.merged.reserve(scan.k + capacity_);
      own.counts.resize(static_cast<std::size_t>(queries_));
    }
  }

  bool run() {
    for (i64 q0 = 0; q0 < q_.rows; q0 += queries_) scan_queries(q0);
    return std::any_of(workers_.begin(), workers_.end(), [](const Worker& w) { return w.nan; });
  }

 private:
  // Columns of a row of scores: whole chunks of the filter.
  static i64 row_width(i64 columns) { return (columns + 15) / 16 * 16; }

  void scan_queries(i64 q0) {
    const i64 used = std::min(queries_, q_.rows - q0);
    const i64 panels = engine_.panels(used);
    for (i64 j = 0; j < width_; ++j)
      q_inv_.data()[j] = scan_.operands.q_inv && j < used ? scan_.operands.q_inv[q0 + j] : 1.0f;
    // Here and not in work(): OpenMP may grant fewer threads than asked for.
    for (Worker& own : workers_) std::fill(own.counts.begin(), own.counts.end(), 0);
    std::atomic<i64> next{0};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
#pragma omp for schedule(static)
      for (i64 panel = 0; panel < panels; ++panel) pack(q0, used, panel);
      Worker& own = workers_[static_cast<std::size_t>(omp_get_thread_num())];
      work(own, q0, used, next);
#pragma omp barrier
#pragma omp for schedule(static)
      for (i64 i = 0; i < used; ++i) merge(own, q0, i);
    }
#else
    for (i64 panel = 0; panel < panels; ++panel) pack(q0, used, panel);
    work(workers_[0], q0, used, next);
    for (i64 i = 0; i < used; ++i) merge(workers_[0], q0, i);
#endif
  }

  void pack(i64 q0, i64 used, i64 panel) {
    MatrixView part = q_;
    part.data = q_.row(q0 + panel * engine_.lanes);
    part.rows = std::min(engine_.lanes, used - panel * engine_.lanes);
    if (dots_ != nullptr) return engine_.stage_rows(packed_.data(), part);
    engine_.pack_vectors(packed_.data() + panel * engine_.lanes * words_, part);
  }

  void work(Worker& own, i64 q0, i64 used, std::atomic<i64>& next) {
    for (i64 i = 0; i < width_; ++i)
      own.threshold.data()[i] = i < used ? first_threshold(q0 + i) : kNever;
    for (i64 block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks_;) {
      const i64 c0 = block * block_;
      const i64 m = std::min(block_, c_.rows - c0);
      if (dots_ != nullptr) {
        one(own, c0, m);
        continue;
      }
      const bool narrow = used <= engine_.narrow_lanes;
      const i64 columns =
          row_width(narrow ? engine_.narrow_lanes : engine_.panels(used) * engine_.lanes);
      score(own, c0, m, narrow, used, columns);
      collect(own, q0, used, c0, m, columns);
    }
  }

  // What a score must exceed to improve on the keys so far.
  float first_threshold(i64 query) const {
    const i64* keys = scan_.keys + query * scan_.k;
    i64 worst = std::numeric_limits<i64>::max();
    for (i64 j = 0; j < scan_.k; ++j) {
      // A later index than ours would lose an equal score; that is left to the merge.
      if (keys[j] == kEmptyKey || topk_index(keys[j]) >= scan_.first) return kAlways;
      worst = std::min(worst, keys[j]);
    }
    return topk_score(worst);
  }

  // Candidates as rows of words; their distance in bytes comes back in stride.
  const void* rows(Worker& own, i64 c0, i64 m, i64* stride) const {
    *stride = c_.row_stride * element_size(c_.element);
    if (in_place_) return c_.row(c0);
    MatrixView part = c_;
    part.data = c_.row(c0);
    part.rows = m;
    engine_.stage_rows(own.staged.data(), part);
    *stride = words_ * 4;
    return own.staged.data();
  }

  // What score() and collect() do, for a single query.
  void one(Worker& own, i64 c0, i64 m) const {
    i64 stride;
    const void* a = rows(own, c0, m, &stride);
    float* s = own.scores.data();
    dots_(a, stride, m, packed_.data(), words_, s);
    const float* c_inv = scan_.operands.c_inv;
    if (scaled_)  // in the order of the filter
      for (i64 r = 0; r < m; ++r) s[r] = s[r] * q_inv_.data()[0] * (c_inv ? c_inv[c0 + r] : 1.0f);
    float* threshold = own.threshold.data();
    const i64 chunks = (m + 15) / 16;
    std::fill_n(own.level.data(), chunks * 16, *threshold);
    u16 masks[kStreamRows / 16];
    if (!filter_(s, nullptr, 1.0f, own.level.data(), chunks, masks)) return;
    for (i64 chunk = 0; chunk < chunks; ++chunk) {
      for (unsigned mask = masks[chunk]; mask != 0; mask &= mask - 1) {
        const i64 r = chunk * 16 + __builtin_ctz(mask);
        if (r < m && allowed(0, c0 + r)) take(own, 0, threshold, s[r], c0 + r);
      }
    }
  }

  bool allowed(i64 query, i64 candidate) const {
    return scan_.allowed == nullptr ||
           scan_.allowed[query * scan_.allowed_stride + candidate] != 0;
  }

  void take(Worker& own, i64 i, float* threshold, float s, i64 candidate) const {
    if (s != s)
      own.nan = true;
    else if (!(s <= *threshold))
      topk_append(own.keys.data() + i * capacity_, &own.counts[static_cast<std::size_t>(i)],
                  threshold, topk_key(s, scan_.first + candidate), scan_.k, capacity_);
  }

  void score(Worker& own, i64 c0, i64 m, bool narrow, i64 used, i64 columns) const {
    i64 stride;
    const void* a = rows(own, c0, m, &stride);
    if (narrow)
      engine_.multiply_narrow(a, stride, 4, m, packed_.data(), words_, own.scores.data(), columns,
                              false);
    else
      engine_.multiply(a, stride, 4, m, packed_.data(), words_, engine_.panels(used),
                       own.scores.data(), columns, false);
  }

  void collect(Worker& own, i64 q0, i64 used, i64 c0, i64 m, i64 columns) const {
    u16 masks[kMaxQueries / 16];
    for (i64 r = 0; r < m; ++r) {
      const i64 candidate = c0 + r;
      if (scan_.allowed_stride == 0 && !allowed(0, candidate)) continue;
      float* s = own.scores.data() + r * columns;
      const float factor = scan_.operands.c_inv ? scan_.operands.c_inv[candidate] : 1.0f;
      const i64 chunks = (used + 15) / 16;
      if (!filter_(s, scaled_ ? q_inv_.data() : nullptr, factor, own.threshold.data(), chunks,
                   masks))
        continue;
      for (i64 chunk = 0; chunk < chunks; ++chunk) {
        for (unsigned mask = masks[chunk]; mask != 0; mask &= mask - 1) {
          const i64 i = chunk * 16 + __builtin_ctz(mask);
          // The scores of filling columns are NaN where the candidate holds infinity.
          if (i >= used) break;
          if (allowed(q0 + i, candidate))
            take(own, i, own.threshold.data() + i, s[i], candidate);
        }
      }
    }
  }

  void merge(Worker& own, i64 q0, i64 i) const {
    i64* keys = scan_.keys + (q0 + i) * scan_.k;
    i64* all = own.merged.data();
    std::copy_n(keys, scan_.k, all);
    for (const Worker& other : workers_) {
      const i64 count = other.counts[static_cast<std::size_t>(i)];
      std::copy_n(other.keys.data() + i * capacity_, count, all + scan_.k);
      topk_compact(all, scan_.k + count, scan_.k);
    }
    std::copy_n(all, scan_.k, keys);
  }

  const TopkScan& scan_;
  const MatrixView& q_;
  const MatrixView& c_;
  const TileEngine& engine_;
  const TopkFilterFn filter_;
  const TopkDotsFn dots_;  // nullptr: the tile engine scores
  const i64 words_;
  const bool in_place_, scaled_;
  i64 block_, blocks_, capacity_, queries_, width_;
  int threads_;
  ScratchBuffer<u32> packed_;
  ScratchBuffer<float> q_inv_;
  std::vector<Worker> workers_;
};

void check(const SimilarityOperands& operands, i64 k, int threads) {
  if (operands.q.columns != operands.c.columns)
    throw std::invalid_argument("queries and candidates differ in length");
  if (k < 1) throw std::invalid_argument("k must be at least 1");
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
}

}  // namespace

bool similarity_topk_scan(const TopkScan& scan, int threads, Isa isa) {
  check(scan.operands, scan.k, threads);
  if (scan.operands.q.rows == 0 || scan.operands.c.rows == 0) return false;
  return Scanner(scan, threads, isa).run();
}

}  // namespace ume
