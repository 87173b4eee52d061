// Selection of the best keys: what the top-k does with a score once it is there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#include "ume/similarity_topk.h"

namespace ume {

inline std::int64_t topk_key(float score, std::int64_t index) {
  score += 0.0f;  // -0 becomes 0: equal as numbers, so they must be as bits
  std::int32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const std::int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  const std::uint64_t high = static_cast<std::uint64_t>(static_cast<std::uint32_t>(ordered)) << 32;
  return static_cast<std::int64_t>(high | (0xffffffffu - static_cast<std::uint32_t>(index)));
}

inline float topk_score(std::int64_t key) {
  const std::int32_t ordered = static_cast<std::int32_t>(key >> 32);
  const std::int32_t bits = ordered ^ ((ordered >> 31) & 0x7fffffff);
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

inline std::int64_t topk_index(std::int64_t key) {
  return static_cast<std::int64_t>(0xffffffffu - static_cast<std::uint32_t>(key));
}

// Keeps the k largest of count keys in front, in any order; returns how many there are.
inline std::int64_t topk_compact(std::int64_t* keys, std::int64_t count, std::int64_t k) {
  if (count <= k) return count;
  std::nth_element(keys, keys + (k - 1), keys + count, std::greater<std::int64_t>());
  return k;
}

// Capacity of a buffer that collects keys and is compacted when full: constant work per key.
inline std::int64_t topk_capacity(std::int64_t k, std::int64_t candidates) {
  return std::max<std::int64_t>(std::min(k + std::max<std::int64_t>(k, 64), candidates), 1);
}

// Appends a key to the buffer of one query. A score s is of interest unless s <= *threshold, which
// is NaN as long as every score is. Indices must rise, so that equal scores lose.
inline void topk_append(std::int64_t* keys, std::int64_t* count, float* threshold,
                        std::int64_t key, std::int64_t k, std::int64_t capacity) {
  keys[(*count)++] = key;
  if (*count < capacity || *count <= k) return;
  *count = topk_compact(keys, *count, k);
  const float kth = topk_score(keys[k - 1]);
  if (!(kth <= *threshold)) *threshold = kth;
}

}  // namespace ume
