// The elementwise half of the contrastive loss on the CPU: what happens to one row of scores
// between the matrix products. One table of functions per instruction set.
#pragma once

#include <cstdint>

#include "ume/cpu_features.h"
#include "ume/element.h"

namespace ume {

// Every function works on n consecutive scores. exp() is within 2 ulp, 0 below -87 and finite
// above 88; NaN stays NaN and is ignored by the maxima.
struct ContrastiveRowOps {
  // s[j] *= factor * column[j]
  void (*scale)(float* s, const float* column, float factor, std::int64_t n);
  // max_j s[j], -inf for none
  float (*max)(const float* s, std::int64_t n);
  // top[j] = max(top[j], s[j])
  void (*max_into)(float* top, const float* s, std::int64_t n);
  // sum_j exp(s[j] - shift)
  float (*exp_sum)(const float* s, float shift, std::int64_t n);
  // sums[j] += exp(s[j] - shift[j])
  void (*exp_into)(float* sums, const float* s, const float* shift, std::int64_t n);
  // both of them at once with one shift: sums[j] += e[j]; returns sum_j e[j]
  float (*exp_both)(float* sums, const float* s, float shift, std::int64_t n);
  // s[j] = exp(s[j] - shift) * (row + column[j])
  void (*weights)(float* s, float shift, float row, const float* column, std::int64_t n);
  // s[j] = exp(s[j] - shift) * row
  void (*weights_row)(float* s, float shift, float row, std::int64_t n);
  // s[j] += exp(x[j] - shift[j]) * column[j]
  void (*weights_column)(float* s, const float* x, const float* shift, const float* column,
                         std::int64_t n);
  // out[j] = bf16(s[j]), to nearest even
  void (*to_bf16)(std::uint16_t* out, const float* s, std::int64_t n);
  // out[2 j] = bf16(a[j]), out[2 j + 1] = bf16(b[j])
  void (*to_bf16_pairs)(std::uint16_t* out, const float* a, const float* b, std::int64_t n);
  // sum_j x[j] g[j]
  float (*dot)(const void* x, Element element, const float* g, std::int64_t n);
  // out[j] = scale * g[j] + factor * x[j], bf16 for bf16 x, else fp32; out may be g
  void (*project)(void* out, const void* x, Element element, const float* g, float scale,
                  float factor, std::int64_t n);
};

// Throws std::invalid_argument when this machine or build has no path for `isa`.
const ContrastiveRowOps& contrastive_row_ops(Isa isa);

}  // namespace ume
