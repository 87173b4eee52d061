#include "topk_filter.h"

#include "ume/simd.h"

#ifdef UME_X86
#include <immintrin.h>
#endif

namespace ume {
namespace {

using i64 = std::int64_t;
using u16 = std::uint16_t;

bool filter_scalar(float* s, const float* query, float candidate, const float* threshold,
                   i64 chunks, u16* masks) {
  unsigned any = 0;
  for (i64 chunk = 0; chunk < chunks; ++chunk) {
    unsigned mask = 0;
    for (i64 j = chunk * 16; j < chunk * 16 + 16; ++j) {
      if (query != nullptr) s[j] = s[j] * query[j] * candidate;
      mask |= static_cast<unsigned>(!(s[j] <= threshold[j])) << (j % 16);
    }
    masks[chunk] = static_cast<u16>(mask);
    any |= mask;
  }
  return any != 0;
}

#ifdef UME_X86

__attribute__((target("avx2"))) bool filter_avx2(float* s, const float* query, float candidate,
                                                 const float* threshold, i64 chunks, u16* masks) {
  unsigned any = 0;
  const __m256 factor = _mm256_set1_ps(candidate);
  for (i64 chunk = 0; chunk < chunks; ++chunk) {
    unsigned mask = 0;
    for (i64 half = 0; half < 2; ++half) {
      const i64 j = chunk * 16 + half * 8;
      __m256 v = _mm256_loadu_ps(s + j);
      if (query != nullptr) {
        v = _mm256_mul_ps(_mm256_mul_ps(v, _mm256_loadu_ps(query + j)), factor);
        _mm256_storeu_ps(s + j, v);
      }
      const __m256 above = _mm256_cmp_ps(v, _mm256_loadu_ps(threshold + j), _CMP_NLE_UQ);
      mask |= static_cast<unsigned>(_mm256_movemask_ps(above)) << (half * 8);
    }
    masks[chunk] = static_cast<u16>(mask);
    any |= mask;
  }
  return any != 0;
}

__attribute__((target("avx512f"))) bool filter_avx512(float* s, const float* query,
                                                      float candidate, const float* threshold,
                                                      i64 chunks, u16* masks) {
  unsigned any = 0;
  const __m512 factor = _mm512_set1_ps(candidate);
  for (i64 chunk = 0; chunk < chunks; ++chunk) {
    const i64 j = chunk * 16;
    __m512 v = _mm512_loadu_ps(s + j);
    if (query != nullptr) {
      v = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_loadu_ps(query + j)), factor);
      _mm512_storeu_ps(s + j, v);
    }
    const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_loadu_ps(threshold + j), _CMP_NLE_UQ);
    masks[chunk] = above;
    any |= above;
  }
  return any != 0;
}

#endif

}  // namespace

TopkFilterFn topk_filter(Isa isa) {
#ifdef UME_X86
  if (isa == Isa::kAvx2) return filter_avx2;
  if (isa != Isa::kScalar) return filter_avx512;
#endif
  (void)isa;
  return filter_scalar;
}

}  // namespace ume
