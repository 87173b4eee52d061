// Reductions over the lanes that share a row or a column of a fragment (tile_layout.cuh).
#pragma once

#include "ume/contrastive_loss_cuda.h"
#include "ume/cuda/tile_layout.cuh"

namespace ume::cuda {

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {  // a number beats NaN
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Min {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
};

// Over lanes that differ in the bits from kFirst to kLast; every one of them gets the result.
template <int kFirst, int kLast, class Op>
__device__ __forceinline__ float reduce_lanes(float v, Op op) {
#pragma unroll
  for (int bit = kFirst; bit <= kLast; bit *= 2) v = op(v, __shfl_xor_sync(kAllLanes, v, bit));
  return v;
}

// Over the four lanes of a row, the eight of a column, and all.
template <class Op>
__device__ __forceinline__ float reduce_row(float v, Op op) {
  return reduce_lanes<1, 2>(v, op);
}
template <class Op>
__device__ __forceinline__ float reduce_column(float v, Op op) {
  return reduce_lanes<4, 16>(v, op);
}
template <class Op>
__device__ __forceinline__ float reduce_warp(float v, Op op) {
  return reduce_lanes<1, 16>(v, op);
}

// Sums each of kCount lane columns over the eight lanes that share it, with a third of the shuffles
// of reduce_column: at each step a lane gives half of its columns away. On return v[0 … kCount / 8)
// are complete; the first of them is lane column `scattered_start` of the kCount.
template <int kCount>
__device__ __forceinline__ void scatter_column_sums(float (&v)[kCount], int lane) {
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int bit = 16 >> step, half = kCount / 2 >> step;
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int c = 0; c < kCount / 2; ++c) {
      if (c >= half) continue;
      const float keep = upper ? v[c + half] : v[c];
      const float give = upper ? v[c] : v[c + half];
      v[c] = keep + __shfl_xor_sync(kAllLanes, give, bit);
    }
  }
}
template <int kCount>
__device__ __forceinline__ int scattered_start(int lane) {
  const int eighth = (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
  return eighth * (kCount / 8);
}

// The exponent that partial sums are taken relative to: any finite one will do for no terms at all
// ({-inf, 0}) and for an infinite one.
__device__ __forceinline__ float finite_origin(float max) {
  return max == -infinity() || max == infinity() ? 0.0f : max;
}

// Sum of two partial sums.
__device__ __forceinline__ PartialSum merge(PartialSum a, PartialSum b) {
  const float max = fmaxf(a.max, b.max);
  const float origin = finite_origin(max) * kLog2E;
  return {max, a.sum * exp2_fast(fmaf(a.max, kLog2E, -origin)) +
                   b.sum * exp2_fast(fmaf(b.max, kLog2E, -origin))};
}

}  // namespace ume::cuda
