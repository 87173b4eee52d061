// y[M,N] = x[M,K] @ w[N,K]^T + b[N] in bf16 with fp32 accumulation, for few rows of x.
#pragma once

#include <cstdint>

#include "ume/cpu_features.h"

namespace ume {

struct LinearBf16 {
  std::uint16_t* y;        // [M, N], row stride N
  const std::uint16_t* x;  // [M, K], row stride ldx
  const std::uint16_t* w;  // [N, K], row stride ldw
  const std::uint16_t* b;  // [N] or nullptr
  std::int64_t m, n, k;
  std::int64_t ldx, ldw;  // in elements
};

// Runs on `threads` OpenMP threads, parallel over rows of w. Every y[i,j] is accumulated in one
// fixed order that depends only on k and the instruction set, so it is bit-identical whatever m,
// the other rows and the number of threads are.
void linear_bf16(const LinearBf16& args, int threads, Isa isa);

}  // namespace ume
