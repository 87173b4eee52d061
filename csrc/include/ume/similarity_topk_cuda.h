// The best candidates of every query by inner product, on a CUDA device, without storing scores.
// The definition is ume_kernels/similarity_topk/reference.py.
#pragma once

#include <cstdint>

#include "ume/element.h"

namespace ume {

// Keys a row of a split can hold before it is compacted to its k best.
inline constexpr int kTopkCapacity = 512;
inline constexpr int kTopkMaxK = 128;

// s[i, j] = <q_i, c_j> * q_inv[i] * c_inv[j], accumulated in fp32. A key holds the score as an
// ordered integer above 0xFFFFFFFF - (first + j): larger is better, equal scores go to the lower
// index. The smallest int64 is an empty key. Addresses are on the device; q and c are aligned to
// 16 bytes, depth and both strides are multiples of 8.
struct SimilarityTopkCuda {
  const void* q;    // [queries, depth]
  const void* c;    // [candidates, depth]
  Element element;  // of q and c: kFloat16 or kBFloat16
  std::int64_t queries, candidates, depth;
  std::int64_t q_stride, c_stride;  // in elements
  const float* q_inv;               // [queries] or nullptr for 1
  const float* c_inv;               // [candidates] or nullptr for 1
  const std::uint8_t* allowed;      // [candidates] or [queries, candidates] or nullptr for all
  std::int64_t allowed_stride;      // from query to query: 0 for [candidates]
  std::int64_t first;               // corpus index of candidate 0
  int k;                            // 1 … kTopkMaxK
  const std::int64_t* best;  // [queries, best_stride]: k keys found before, in any order; only
  std::int64_t best_stride;  // candidates that beat the worst of them are reported
  int splits;                // the candidates are divided between this many blocks
  std::int64_t* buffer;      // [row tiles * 128, splits, kTopkCapacity] scratch
  std::int64_t* keys;        // [queries, splits, k] out: the k best of every split, in any order,
                             // padded with empty keys
  int* invalid;              // one number, set to 1 when a score of an allowed pair is NaN
};

// The scan goes to `stream` (a cudaStream_t) of the current device and returns at once.
// std::runtime_error: the launch failed; it names the kernel and CUDA's reason.
void similarity_topk_cuda(const SimilarityTopkCuda& problem, void* stream);

// Thread blocks of the scan that a multiprocessor of the current device holds at once.
int similarity_topk_blocks_cuda();

// The kernels of one generation of GPUs, and their similarity_topk_blocks_cuda.
void similarity_topk_sm80(const SimilarityTopkCuda& problem, void* stream);
int similarity_topk_blocks_sm80();
void similarity_topk_sm90(const SimilarityTopkCuda& problem, void* stream);
int similarity_topk_blocks_sm90();

}  // namespace ume
