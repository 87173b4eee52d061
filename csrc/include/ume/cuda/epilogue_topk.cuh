// Epilogue of the fused top-k scan: a block walks the candidates of its split in ascending order,
// tile by tile, and keeps for each of its queries what may still be among the k best.
//
// A score above its query's threshold is appended to the query's buffer in global memory, which no
// other block touches. A buffer that the next tile might overflow is compacted to its k best keys,
// and the worst of those becomes the threshold. The longer the scan, the rarer both are. The order
// within a buffer varies from run to run, the set that remains does not.
#pragma once

#include "ume/cuda/tile_layout.cuh"
#include "ume/similarity_topk_cuda.h"

namespace ume::cuda {

inline constexpr std::int64_t kEmptyKey = INT64_MIN;

// A float as an integer of the same order; -0 as 0.
__device__ __forceinline__ std::int32_t ordered_bits(float v) {
  const std::int32_t bits = __float_as_int(v + 0.0f);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(std::int32_t ordered) {
  return __int_as_float(ordered ^ (ordered >> 31 & 0x7fffffff));
}
__device__ __forceinline__ std::int64_t make_key(float score, std::int64_t index) {
  const std::uint64_t high = static_cast<std::uint32_t>(ordered_bits(score));
  return static_cast<std::int64_t>(high << 32 | (0xffffffffu - static_cast<std::uint32_t>(index)));
}

// Sync as for LseEpilogue. Per block: start(); per tile: load(), one barrier, tile(), with a
// barrier between a tile() and the next; finish().
template <class Layout, class Sync>
struct TopkEpilogue {
  static constexpr int kHeight = Layout::kHeight, kWidth = Layout::kWidth;
  static constexpr int kWarpHeight = kHeight / Layout::kWarps;  // queries a warp compacts
  static constexpr int kLaneKeys = kTopkCapacity / 32;
  static_assert(kHeight % Layout::kWarps == 0 && kWarpHeight <= 32, "a lane per query");
  static_assert(kTopkCapacity - kWidth >= kTopkMaxK, "room for a tile after compaction");

  struct Shared {
    float threshold[kHeight];  // only scores above it pass; NaN lets everything pass
    std::int32_t count[kHeight];
    float row_factor[kHeight];
    float col_factor[kWidth];
  };

  static __device__ __forceinline__ void start(Shared& shared, const SimilarityTopkCuda& problem,
                                               int row0, int thread) {
    for (int r = thread; r < kHeight; r += Layout::kThreads) {
      const std::int64_t row = static_cast<std::int64_t>(row0) + r;
      const bool inside = row < problem.queries;
      shared.threshold[r] = inside ? first_threshold(problem, row) : infinity();
      shared.count[r] = 0;
      shared.row_factor[r] = inside && problem.q_inv != nullptr ? problem.q_inv[row] : 1.0f;
    }
  }

  static __device__ __forceinline__ void load(Shared& shared, const SimilarityTopkCuda& problem,
                                              int col0, int thread) {
    for (int c = thread; c < kWidth; c += Layout::kThreads) {
      const std::int64_t column = static_cast<std::int64_t>(col0) + c;
      const bool scaled = problem.c_inv != nullptr && column < problem.candidates;
      shared.col_factor[c] = scaled ? problem.c_inv[column] : 1.0f;
    }
  }

  static __device__ __forceinline__ void tile(Shared& shared, const SimilarityTopkCuda& problem,
                                              typename Layout::Scores& s, int row0, int col0,
                                              int split, int thread) {
    const Layout layout(thread);
    if (problem.q_inv != nullptr || problem.c_inv != nullptr) {
#pragma unroll
      for (int r = 0; r < Layout::kLaneRows; ++r) {
        const float factor = shared.row_factor[layout.row(r)];
#pragma unroll
        for (int c = 0; c < Layout::kLaneColumns; ++c) {
          float& v = Layout::at(s, r, c);
          v = v * factor * shared.col_factor[layout.column(c)];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Layout::kLaneRows; ++r) {
      const float threshold = shared.threshold[layout.row(r)];
      bool any = false;
#pragma unroll
      for (int c = 0; c < Layout::kLaneColumns; ++c) {
        any = any || !(Layout::at(s, r, c) <= threshold);
      }
      if (!any) continue;
#pragma unroll
      for (int c = 0; c < Layout::kLaneColumns; ++c) {
        const float v = Layout::at(s, r, c);
        if (!(v <= threshold)) {
          append(shared, problem, v, layout.row(r), row0, col0 + layout.column(c), split);
        }
      }
    }
    settle();
    const int warp = thread / 32, lane = thread % 32;
    const int count = lane < kWarpHeight ? shared.count[warp * kWarpHeight + lane] : 0;
    std::uint32_t full = __ballot_sync(kAllLanes, count > kTopkCapacity - kWidth);
    for (; full != 0; full &= full - 1) {
      const int r = warp * kWarpHeight + __ffs(full) - 1;
      std::int64_t* const buffer = buffer_of(problem, row0 + r, split);
      const std::int64_t worst = keep_best(buffer, shared.count[r], problem.k, buffer, lane);
      __syncwarp();
      if (lane == 0) {
        shared.count[r] = problem.k;
        shared.threshold[r] = from_ordered(static_cast<std::int32_t>(worst >> 32));
      }
    }
    __syncwarp();
  }

  // Writes the k best keys of every query, padded with empty ones.
  static __device__ __forceinline__ void finish(Shared& shared, const SimilarityTopkCuda& problem,
                                                int row0, int split, int thread) {
    settle();
    const int warp = thread / 32, lane = thread % 32;
    for (int i = 0; i < kWarpHeight; ++i) {
      const int r = warp * kWarpHeight + i;
      const std::int64_t row = static_cast<std::int64_t>(row0) + r;
      if (row >= problem.queries) break;
      const int count = shared.count[r], k = problem.k;
      const std::int64_t* const buffer = buffer_of(problem, row, split);
      std::int64_t* const keys = problem.keys + (row * problem.splits + split) * k;
      if (count > k) {
        keep_best(buffer, count, k, keys, lane);
      } else {
        for (int at = lane; at < k; at += 32) keys[at] = at < count ? buffer[at] : kEmptyKey;
      }
    }
  }

 private:
  // Waits until the appended keys of the queries that this warp compacts are there.
  static __device__ __forceinline__ void settle() {
    if constexpr (Layout::kWarpColumns == 1 && Layout::kRowBlocks == 1) {
      __syncwarp();  // this warp alone has scores of them
    } else {
      Sync::sync();
    }
  }

  static __device__ __forceinline__ std::int64_t* buffer_of(const SimilarityTopkCuda& problem,
                                                            std::int64_t row, int split) {
    return problem.buffer + (row * problem.splits + split) * kTopkCapacity;
  }

  // The worst key found before decides: NaN, which lets everything pass, while there are fewer
  // than k. Equal scores pass only if that key could lose the tie.
  static __device__ __forceinline__ float first_threshold(const SimilarityTopkCuda& problem,
                                                          std::int64_t row) {
    const std::int64_t* const best = problem.best + row * problem.best_stride;
    std::int64_t worst = best[0];
    for (int i = 1; i < problem.k; ++i) worst = best[i] < worst ? best[i] : worst;
    std::int32_t ordered = static_cast<std::int32_t>(worst >> 32);
    const std::uint32_t index = 0xffffffffu - static_cast<std::uint32_t>(worst);
    if (worst != kEmptyKey && index > problem.first) {
      --ordered;
      if (ordered == -1) --ordered;  // -0 is no smaller than 0
    }
    return from_ordered(ordered);
  }

  static __device__ __forceinline__ void append(Shared& shared, const SimilarityTopkCuda& problem,
                                                float v, int r, int row0, int column, int split) {
    const std::int64_t row = static_cast<std::int64_t>(row0) + r;
    if (row >= problem.queries || column >= problem.candidates) return;
    if (problem.allowed != nullptr &&
        problem.allowed[row * problem.allowed_stride + column] == 0) {
      return;
    }
    if (v != v) {
      *problem.invalid = 1;
      return;
    }
    const int at = atomicAdd(&shared.count[r], 1);
    buffer_of(problem, row, split)[at] = make_key(v, problem.first + column);
  }

  // One warp: writes the k largest of count > k different keys to `out` (which may be `keys`) and
  // returns the smallest of those.
  static __device__ __forceinline__ std::int64_t keep_best(const std::int64_t* keys, int count,
                                                           int k, std::int64_t* out, int lane) {
    constexpr std::uint64_t kSign = std::uint64_t{1} << 63;
    std::uint64_t mine[kLaneKeys];  // in unsigned order; an empty key is 0
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int at = lane + 32 * i;
      mine[i] = static_cast<std::uint64_t>(at < count ? keys[at] : kEmptyKey) ^ kSign;
    }
    const std::uint64_t sample = __shfl_sync(kAllLanes, mine[0], 0);
    std::uint64_t varying = 0;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) varying |= lane + 32 * i < count ? mine[i] ^ sample : 0;
    const auto any_lane = [](std::uint64_t word) {
      return __reduce_or_sync(kAllLanes, static_cast<std::uint32_t>(word));
    };
    const std::uint32_t high = any_lane(varying >> 32), low = any_lane(varying);
    int bit = high != 0 ? 63 - __clz(static_cast<int>(high)) : 31 - __clz(static_cast<int>(low));
    // The k-th largest key, bit by bit below the prefix that all share.
    std::uint64_t least = sample & ~((std::uint64_t{2} << bit) - 1);
    for (; bit >= 0; --bit) {
      const std::uint64_t trial = least | std::uint64_t{1} << bit;
      std::uint32_t above = 0;
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) above += mine[i] >= trial ? 1u : 0u;
      above = __reduce_add_sync(kAllLanes, above);
      if (above >= static_cast<std::uint32_t>(k)) least = trial;
      if (above == static_cast<std::uint32_t>(k)) break;
    }
    int start = 0;
    std::uint64_t worst = ~std::uint64_t{0};
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const bool keep = mine[i] >= least;
      const std::uint32_t keepers = __ballot_sync(kAllLanes, keep);
      if (keep) {
        out[start + __popc(keepers & ((1u << lane) - 1))] =
            static_cast<std::int64_t>(mine[i] ^ kSign);
        worst = mine[i] < worst ? mine[i] : worst;
      }
      start += __popc(keepers);
    }
    // Scores first; a threshold needs no more, but the caller gets the whole key.
#pragma unroll
    for (int step = 16; step >= 1; step /= 2) {
      const std::uint64_t other = __shfl_xor_sync(kAllLanes, worst, step);
      worst = other < worst ? other : worst;
    }
    return static_cast<std::int64_t>(worst ^ kSign);
  }
};

}  // namespace ume::cuda
