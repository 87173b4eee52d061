// y[M,N] = x[M,K] @ w[N,K]^T + b[N] with fp32 accumulation, for few rows of x.
#pragma once

#include <cstdint>

#include "ume/cpu_features.h"

namespace ume {

// T is float, or std::uint16_t for the bits of a bf16.
template <typename T>
struct Linear {
  T* y;        // [M, N], row stride N
  const T* x;  // [M, K], row stride ldx
  const T* w;  // [N, K], row stride ldw
  const T* b;  // [N] or nullptr
  std::int64_t m, n, k;
  std::int64_t ldx, ldw;  // in elements
};

// Runs on `threads` OpenMP threads, parallel over rows of w. Every y[i,j] is accumulated in one
// fixed order that depends only on k, T and the instruction set, so it is bit-identical whatever
// m, the other rows and the number of threads are.
void linear(const Linear<std::uint16_t>& args, int threads, Isa isa);
void linear(const Linear<float>& args, int threads, Isa isa);

}  // namespace ume
