#include "topk_dots.h"

#include <algorithm>
#include <cstring>

#include "ume/simd.h"

#ifdef UME_X86
#include <immintrin.h>
#endif

namespace ume {

#ifdef UME_X86
namespace {

using i64 = std::int64_t;
using u32 = std::uint32_t;

#define UME_TARGET __attribute__((target("avx2,fma")))

// t[j] = word k0 + j of each of eight rows.
UME_TARGET UME_INLINE static void transpose(__m256 t[8], const char* const* rows, i64 k0) {
  __m256 h[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* low = reinterpret_cast<const float*>(rows[i]) + k0;
    const float* high = reinterpret_cast<const float*>(rows[i + 4]) + k0;
    h[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
    h[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)),
                                    _mm_loadu_ps(high + 4), 1);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(h[i], h[i + 1]), b = _mm256_unpackhi_ps(h[i], h[i + 1]);
    const __m256 c = _mm256_unpacklo_ps(h[i + 2], h[i + 3]);
    const __m256 d = _mm256_unpackhi_ps(h[i + 2], h[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
}

// One word of eight rows.
UME_TARGET UME_INLINE static __m256 gather(const char* const* rows, i64 k) {
  float column[8];
  for (int i = 0; i < 8; ++i) std::memcpy(column + i, rows[i] + 4 * k, 4);
  return _mm256_loadu_ps(column);
}
#undef UME_TARGET

namespace fp32 {
#define UME_TARGET __attribute__((target("avx2,fma")))
UME_TARGET UME_INLINE static __m256 madd(__m256 acc, __m256 a, __m256 b) {
  return _mm256_fmadd_ps(a, b, acc);
}
#include "topk_dots.inc"
#undef UME_TARGET
}  // namespace fp32

#ifdef UME_HAS_AVX512BF16_COMPILER
namespace bf16 {
#define UME_TARGET __attribute__((target("avx2,fma,avx512f,avx512vl,avx512bf16")))
UME_TARGET UME_INLINE static __m256 madd(__m256 acc, __m256 a, __m256 b) {
  return _mm256_dpbf16_ps(acc, (__m256bh)a, (__m256bh)b);
}
#include "topk_dots.inc"
#undef UME_TARGET
}  // namespace bf16
#endif

}  // namespace
#endif

TopkDotsFn topk_dots(Isa isa, Compute compute) {
#ifdef UME_X86
  if (compute == Compute::kFloat32 && isa != Isa::kScalar) return fp32::dots;
#ifdef UME_HAS_AVX512BF16_COMPILER
  if (compute == Compute::kBFloat16 && isa == Isa::kAvx512Bf16) return bf16::dots;
#endif
#endif
  (void)isa, (void)compute;
  return nullptr;
}

}  // namespace ume
