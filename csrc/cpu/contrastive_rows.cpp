// ContrastiveRowOps for every instruction set; the bodies are in contrastive_rows.inc.
#include "contrastive_rows.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ume/simd.h"

namespace ume {
namespace {

using i64 = std::int64_t;

namespace scalar {
#define UME_TARGET
#define UME_MADD(a, b, c) ((a) * (b) + (c))
#include "contrastive_rows.inc"
#undef UME_TARGET
#undef UME_MADD
}  // namespace scalar

#ifdef UME_X86
#define UME_MADD(a, b, c) __builtin_fmaf(a, b, c)

namespace avx2 {
#define UME_TARGET __attribute__((target("avx2,fma")))
#include "contrastive_rows.inc"
#undef UME_TARGET
}  // namespace avx2

namespace avx512 {
#if defined(__clang__)
#define UME_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))
#else
#define UME_TARGET \
  __attribute__((  \
      target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#endif
#include "contrastive_rows.inc"
#undef UME_TARGET
}  // namespace avx512

#undef UME_MADD
#endif  // UME_X86

}  // namespace

const ContrastiveRowOps& contrastive_row_ops(Isa isa) {
  if (!isa_supported(isa))
    throw std::invalid_argument(std::string("this processor or build has no ") + isa_name(isa) +
                                " path");
  switch (isa) {
#ifdef UME_X86
    case Isa::kScalar: return scalar::kOps;
    case Isa::kAvx2: return avx2::kOps;
    default: return avx512::kOps;
#else
    default: return scalar::kOps;
#endif
  }
}

}  // namespace ume
