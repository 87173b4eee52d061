// The tile engine for every instruction set; see tile_engine.inc for the loop nest over
// vectors, tile_engine_amx.cpp for that over matrix tiles and tile_pack.inc for the packing.
#include "ume/tile_engine.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "tile_engine_amx.h"

#ifdef UME_X86
#include <immintrin.h>
#endif

namespace ume {
namespace {

using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i64 = std::int64_t;

namespace scalar {
#define UME_TARGET
// Four lanes: what the baseline of every processor we know has as a vector.
constexpr int kVecLanes = 4, kRows = 4, kVectors = 2;
constexpr bool kPairs = false;
using Vec = float __attribute__((vector_size(16)));
using Word = Vec;
UME_INLINE static Vec zero() { return Vec{}; }
UME_INLINE static Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
UME_INLINE static void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
UME_INLINE static Word load_words(const u32* p) {
  Word w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
UME_INLINE static Word broadcast(const char* p) {
  float f;
  std::memcpy(&f, p, sizeof f);
  return Word{f, f, f, f};
}
UME_INLINE static Vec madd(Vec acc, Word a, Word b) { return acc + a * b; }
#include "tile_engine.inc"
#include "tile_pack.inc"
#undef UME_TARGET
}  // namespace scalar

#ifdef UME_X86

namespace avx2 {
#define UME_TARGET __attribute__((target("avx2,fma")))
constexpr int kVecLanes = 8, kRows = 6, kVectors = 2;
constexpr bool kPairs = false;
using Vec = __m256;
using Word = __m256;
UME_TARGET UME_INLINE static Vec zero() { return _mm256_setzero_ps(); }
UME_TARGET UME_INLINE static Vec load(const float* p) { return _mm256_loadu_ps(p); }
UME_TARGET UME_INLINE static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
UME_TARGET UME_INLINE static Word load_words(const u32* p) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
}
UME_TARGET UME_INLINE static Word broadcast(const char* p) {
  float f;
  std::memcpy(&f, p, sizeof f);
  return _mm256_set1_ps(f);
}
UME_TARGET UME_INLINE static Vec madd(Vec acc, Word a, Word b) {
  return _mm256_fmadd_ps(a, b, acc);
}
#include "tile_engine.inc"
#include "tile_pack.inc"
#undef UME_TARGET
}  // namespace avx2

namespace avx512 {
#define UME_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))
constexpr int kVecLanes = 16, kRows = 12, kVectors = 2;
constexpr bool kPairs = false;
using Vec = __m512;
using Word = __m512;
UME_TARGET UME_INLINE static Vec zero() { return _mm512_setzero_ps(); }
UME_TARGET UME_INLINE static Vec load(const float* p) { return _mm512_loadu_ps(p); }
UME_TARGET UME_INLINE static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
UME_TARGET UME_INLINE static Word load_words(const u32* p) { return _mm512_loadu_ps(p); }
UME_TARGET UME_INLINE static Word broadcast(const char* p) {
  float f;
  std::memcpy(&f, p, sizeof f);
  return _mm512_set1_ps(f);
}
UME_TARGET UME_INLINE static Vec madd(Vec acc, Word a, Word b) {
  return _mm512_fmadd_ps(a, b, acc);
}
#include "tile_engine.inc"
#include "tile_pack.inc"
#undef UME_TARGET
}  // namespace avx512

#ifdef UME_HAS_AVX512BF16_COMPILER
namespace avx512_bf16 {
#define UME_TARGET \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
constexpr int kVecLanes = 16, kRows = 12, kVectors = 2;
constexpr bool kPairs = true;
using Vec = __m512;
using Word = __m512i;
UME_TARGET UME_INLINE static Vec zero() { return _mm512_setzero_ps(); }
UME_TARGET UME_INLINE static Vec load(const float* p) { return _mm512_loadu_ps(p); }
UME_TARGET UME_INLINE static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
UME_TARGET UME_INLINE static Word load_words(const u32* p) { return _mm512_loadu_si512(p); }
UME_TARGET UME_INLINE static Word broadcast(const char* p) {
  int word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}
UME_TARGET UME_INLINE static Vec madd(Vec acc, Word a, Word b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
#include "tile_engine.inc"
#include "tile_pack.inc"
#undef UME_TARGET
}  // namespace avx512_bf16
#endif

// Packing for the matrix tiles, which have a file of their own.
namespace amx {
#define UME_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))
constexpr i64 kLanes = kAmxLanes;
constexpr bool kPairs = true;
#include "tile_pack.inc"
#undef UME_TARGET
}  // namespace amx

#endif  // UME_X86

#define UME_ENGINE(set, name, compute)                                                      \
  {                                                                                         \
    name, compute, set::kLanes, set::kRows, set::multiply, set::kLanes / 2,                 \
        set::multiply_narrow, set::pack_vectors, set::pack_matrix, set::stage_rows          \
  }
const TileEngine kScalar = UME_ENGINE(scalar, "scalar", Compute::kFloat32);
#ifdef UME_X86
const TileEngine kAvx2 = UME_ENGINE(avx2, "avx2", Compute::kFloat32);
const TileEngine kAvx512 = UME_ENGINE(avx512, "avx512f", Compute::kFloat32);
#ifdef UME_HAS_AVX512BF16_COMPILER
const TileEngine kAvx512Bf16 = UME_ENGINE(avx512_bf16, "avx512_bf16", Compute::kBFloat16);
#endif

TileEngine amx_engine(const char* name, const AmxProducts& products) {
  return {name,
          Compute::kBFloat16,
          kAmxLanes,
          kAmxRows,
          products.multiply,
          kAmxLanes / 2,
          products.multiply_narrow,
          amx::pack_vectors,
          amx::pack_matrix,
          amx::stage_rows};
}
const TileEngine kAmxBf16 = amx_engine("amx_bf16", amx_products());
const TileEngine kAmxEmulated = amx_engine("amx_emulated", amx_emulated_products());
#endif
#undef UME_ENGINE

}  // namespace

Compute compute_for(Isa isa, Element a, Element b) {
  const bool has_bf16 = static_cast<int>(isa) >= static_cast<int>(Isa::kAvx512Bf16);
  return has_bf16 && a == Element::kBFloat16 && b == Element::kBFloat16 ? Compute::kBFloat16
                                                                        : Compute::kFloat32;
}

const TileEngine& tile_engine(Compute compute, Isa isa) {
  if (!isa_supported(isa))
    throw std::invalid_argument(std::string("this processor or build has no ") + isa_name(isa) +
                                " path");
  if (compute == Compute::kFloat32) {
#ifdef UME_X86
    if (isa == Isa::kScalar) return kScalar;
    return isa == Isa::kAvx2 ? kAvx2 : kAvx512;
#else
    return kScalar;
#endif
  }
#ifdef UME_HAS_AVX512BF16_COMPILER
  if (isa == Isa::kAvx512Bf16) return kAvx512Bf16;
#endif
#ifdef UME_X86
  if (isa == Isa::kAmxBf16) return kAmxBf16;
  if (isa == Isa::kAmxEmulated) return kAmxEmulated;
#endif
  throw std::invalid_argument(std::string(isa_name(isa)) + " has no products of bf16 words");
}

}  // namespace ume
