// The k candidates with the largest inner product for each query, without a score matrix.
#pragma once

#include <cstdint>
#include <limits>

#include "ume/cpu_features.h"
#include "ume/element.h"

namespace ume {

// One score and its index as an integer: the larger key is the better one, equal scores go to the
// lowest index. No score is as small as kEmptyKey, which says "nothing here".
constexpr std::int64_t kEmptyKey = std::numeric_limits<std::int64_t>::min();

struct SimilarityOperands {
  MatrixView q;        // [Q, D]
  MatrixView c;        // [n, D]
  const float* q_inv;  // [Q] factors on the scores, or nullptr
  const float* c_inv;  // [n], or nullptr
};

struct TopkScan {
  SimilarityOperands operands;
  // Which candidates count, one byte each: [n] when allowed_stride is 0, else [Q, n] with that row
  // stride; nullptr: all.
  const std::uint8_t* allowed;
  std::int64_t allowed_stride;
  std::int64_t first;  // index of candidate 0
  std::int64_t k;
  std::int64_t* keys;  // [Q, k], the best so far in any order; replaced by the best now
};

// Merges the candidates into the keys; true if the score of an allowed pair is NaN (such a pair is
// left out). Scores are (q . c) * q_inv * c_inv in fp32. Parallel over candidates; the result does
// not depend on the number of threads.
bool similarity_topk_scan(const TopkScan& scan, int threads, Isa isa);

struct TopkSegments {
  SimilarityOperands operands;
  const std::int64_t* offsets;  // [Q + 1]: query i has candidates rows[offsets[i]:offsets[i + 1]]
  const std::int64_t* rows;     // rows of c, in any order
  std::int64_t first;           // index of row 0
  std::int64_t k;
  std::int64_t* keys;  // [Q, k], written; kEmptyKey where a list is shorter than k
};

// The same for a list of candidates per query, with bit-identical scores. Parallel over queries.
bool similarity_topk_segments(const TopkSegments& segments, int threads, Isa isa);

}  // namespace ume
