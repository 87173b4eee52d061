// Small-batch linear in bf16 or fp32 on the CPU: row-major weights as they lie, read once at memory
// speed.
//
// Each tile of kTileRows weight rows is one unit of parallel work. Inside it, register blocks of
// R weight rows x C rows of x share their loads; see linear_tile.inc for the loop nest and
// the order of accumulation.
#include "ume/linear.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "ume/element.h"
#include "ume/simd.h"

#ifdef UME_X86
#include <immintrin.h>
#endif

namespace ume {
namespace {

using u16 = std::uint16_t;
using i64 = std::int64_t;

constexpr int kTileRows = 16;       // weight rows per tile
constexpr int kMaxRows = 16;        // rows of x whose accumulators are live at once
constexpr i64 kSliceBytes = 16384;  // of x per k-block

// Elements per chunk in fp32. One sum over k = 8960 has 2.2 times the error of PyTorch's blocked
// GEMM with the 8 lanes of AVX2, chunks have 0.6 times. Results in bf16 are rounded far above that.
constexpr i64 kChunkFp32 = 256;

UME_INLINE float widened(float v) { return v; }
UME_INLINE float widened(u16 v) { return from_bf16(v); }
template <typename T>
T rounded(float v);
template <>
UME_INLINE float rounded<float>(float v) { return v; }
template <>
UME_INLINE u16 rounded<u16>(float v) { return to_bf16(v); }

namespace scalar {
#define UME_TARGET
// Eight lanes keep the compiler free to use whatever vectors the baseline has.
constexpr int kStep = 8, kAccFloats = 8, kStripRows = 4;
struct Acc { float lane[8]; };
using Vec = Acc;
UME_INLINE static Acc zero() { return Acc{}; }
template <typename T>
UME_INLINE static Vec load(const T* p) {
  Vec v;
  for (int i = 0; i < 8; ++i) v.lane[i] = widened(p[i]);
  return v;
}
template <typename T>
UME_INLINE static Vec load_tail(const T* p, int count) {
  Vec v{};
  for (int i = 0; i < count; ++i) v.lane[i] = widened(p[i]);
  return v;
}
UME_INLINE static Acc dot(Acc acc, const Vec& a, const Vec& b) {
  for (int i = 0; i < 8; ++i) acc.lane[i] += a.lane[i] * b.lane[i];
  return acc;
}
UME_INLINE static Acc load_acc(const float* p) {
  Acc a;
  std::memcpy(a.lane, p, sizeof a.lane);
  return a;
}
UME_INLINE static Acc add(const Acc& a, const Acc& b) {
  Acc sum;
  for (int i = 0; i < 8; ++i) sum.lane[i] = a.lane[i] + b.lane[i];
  return sum;
}
UME_INLINE static void store_acc(float* p, const Acc& a) { std::memcpy(p, a.lane, sizeof a.lane); }
static void sum_tile(const float* acc, float* out) {
  for (int r = 0; r < kTileRows; ++r, acc += 8)
    out[r] = ((acc[0] + acc[4]) + (acc[2] + acc[6])) + ((acc[1] + acc[5]) + (acc[3] + acc[7]));
}
namespace bf16 {
using T = u16;
constexpr i64 kChunk = 0;
#include "linear_tile.inc"
}  // namespace bf16
namespace fp32 {
using T = float;
constexpr i64 kChunk = kChunkFp32;
#include "linear_tile.inc"
}  // namespace fp32
#undef UME_TARGET
}  // namespace scalar

#ifdef UME_X86

namespace avx2 {
#define UME_TARGET __attribute__((target("avx2,fma")))
constexpr int kAccFloats = 8;
using Acc = __m256;
UME_TARGET UME_INLINE static Acc zero() { return _mm256_setzero_ps(); }
UME_TARGET UME_INLINE static Acc load_acc(const float* p) { return _mm256_load_ps(p); }
UME_TARGET UME_INLINE static Acc add(Acc a, Acc b) { return _mm256_add_ps(a, b); }
UME_TARGET UME_INLINE static void store_acc(float* p, Acc a) { _mm256_store_ps(p, a); }
UME_TARGET static void sum_tile(const float* acc, float* out) {
  for (int r = 0; r < kTileRows; ++r, acc += 8) {
    const __m256 a = _mm256_load_ps(acc);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    out[r] = _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
}
namespace bf16 {
using T = u16;
constexpr i64 kChunk = 0;
constexpr int kStep = 16, kStripRows = 4;
struct Vec { __m256 even, odd; };
// A bf16 is the upper half of an fp32: shift the even elements up, mask the odd ones in place.
UME_TARGET UME_INLINE static Vec widen(__m256i raw) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(raw, upper))};
}
UME_TARGET UME_INLINE static Vec load(const u16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
UME_TARGET UME_INLINE static Vec load_tail(const u16* p, int count) {
  alignas(32) u16 buffer[16] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(count) * sizeof(u16));
  return widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(buffer)));
}
UME_TARGET UME_INLINE static Acc dot(Acc acc, const Vec& a, const Vec& b) {
  return _mm256_fmadd_ps(a.odd, b.odd, _mm256_fmadd_ps(a.even, b.even, acc));
}
#include "linear_tile.inc"
}  // namespace bf16
namespace fp32 {
using T = float;
constexpr i64 kChunk = kChunkFp32;
constexpr int kStep = 8, kStripRows = 3;
using Vec = __m256;
UME_TARGET UME_INLINE static Vec load(const float* p) { return _mm256_loadu_ps(p); }
UME_TARGET UME_INLINE static Vec load_tail(const float* p, int count) {
  alignas(32) float buffer[8] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(count) * sizeof(float));
  return _mm256_load_ps(buffer);
}
UME_TARGET UME_INLINE static Acc dot(Acc acc, Vec a, Vec b) { return _mm256_fmadd_ps(a, b, acc); }
#include "linear_tile.inc"
}  // namespace fp32
#undef UME_TARGET
}  // namespace avx2

namespace avx512 {
#define UME_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))
constexpr int kAccFloats = 16, kStripRows = 4;
using Acc = __m512;
UME_TARGET UME_INLINE static Acc zero() { return _mm512_setzero_ps(); }
UME_TARGET UME_INLINE static Acc load_acc(const float* p) { return _mm512_load_ps(p); }
UME_TARGET UME_INLINE static Acc add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
UME_TARGET UME_INLINE static void store_acc(float* p, Acc a) { _mm512_store_ps(p, a); }
#include "sum_tile_avx512.inc"
namespace bf16 {
using T = u16;
constexpr i64 kChunk = 0;
constexpr int kStep = 32;
struct Vec { __m512 even, odd; };
UME_TARGET UME_INLINE static Vec widen(__m512i raw) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(raw, upper))};
}
UME_TARGET UME_INLINE static Vec load(const u16* p) { return widen(_mm512_loadu_si512(p)); }
UME_TARGET UME_INLINE static Vec load_tail(const u16* p, int count) {
  return widen(_mm512_maskz_loadu_epi16((1u << count) - 1u, p));
}
UME_TARGET UME_INLINE static Acc dot(Acc acc, const Vec& a, const Vec& b) {
  return _mm512_fmadd_ps(a.odd, b.odd, _mm512_fmadd_ps(a.even, b.even, acc));
}
#include "linear_tile.inc"
}  // namespace bf16
namespace fp32 {
using T = float;
constexpr i64 kChunk = kChunkFp32;
constexpr int kStep = 16;
using Vec = __m512;
UME_TARGET UME_INLINE static Vec load(const float* p) { return _mm512_loadu_ps(p); }
UME_TARGET UME_INLINE static Vec load_tail(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
}
UME_TARGET UME_INLINE static Acc dot(Acc acc, Vec a, Vec b) { return _mm512_fmadd_ps(a, b, acc); }
#include "linear_tile.inc"
}  // namespace fp32
#undef UME_TARGET
}  // namespace avx512

#ifdef UME_HAS_AVX512BF16_COMPILER
namespace avx512_bf16 {
#define UME_TARGET \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
constexpr int kStep = 32, kAccFloats = 16, kStripRows = 4;
using T = u16;
constexpr i64 kChunk = 0;
using Acc = __m512;
using Vec = __m512i;
UME_TARGET UME_INLINE static Acc zero() { return _mm512_setzero_ps(); }
UME_TARGET UME_INLINE static Vec load(const u16* p) { return _mm512_loadu_si512(p); }
UME_TARGET UME_INLINE static Vec load_tail(const u16* p, int count) {
  return _mm512_maskz_loadu_epi16((1u << count) - 1u, p);
}
UME_TARGET UME_INLINE static Acc dot(Acc acc, Vec a, Vec b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
UME_TARGET UME_INLINE static Acc load_acc(const float* p) { return _mm512_load_ps(p); }
UME_TARGET UME_INLINE static Acc add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
UME_TARGET UME_INLINE static void store_acc(float* p, Acc a) { _mm512_store_ps(p, a); }
#include "sum_tile_avx512.inc"
#include "linear_tile.inc"
#undef UME_TARGET
}  // namespace avx512_bf16
#endif

#endif  // UME_X86

template <typename T>
using TileFn = void (*)(const Linear<T>&, i64);

TileFn<u16> tile_for(Isa isa, u16) {
  switch (isa) {
#ifdef UME_X86
    case Isa::kAvx2: return avx2::bf16::tile;
    case Isa::kAvx512f: return avx512::bf16::tile;
#ifdef UME_HAS_AVX512BF16_COMPILER
    case Isa::kAvx512Bf16:
    case Isa::kAmxBf16: return avx512_bf16::tile;
#endif
#endif
    default: return scalar::bf16::tile;
  }
}

TileFn<float> tile_for(Isa isa, float) {
  switch (isa) {
#ifdef UME_X86
    case Isa::kAvx2: return avx2::fp32::tile;
    case Isa::kAvx512f:
    case Isa::kAvx512Bf16:
    case Isa::kAmxBf16: return avx512::fp32::tile;
#endif
    default: return scalar::fp32::tile;
  }
}

template <typename T>
void run(const Linear<T>& args, int threads, Isa isa) {
  if (!isa_supported(isa))
    throw std::invalid_argument(std::string("this processor or build has no ") + isa_name(isa) +
                                " path");
  const TileFn<T> tile = tile_for(isa, T{});
  const i64 tiles = (args.n + kTileRows - 1) / kTileRows;
  if (threads > tiles) threads = static_cast<int>(tiles);
  if (args.m <= 0 || tiles == 0) return;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#endif
  for (i64 t = 0; t < tiles; ++t) tile(args, t * kTileRows);
}

}  // namespace

void linear(const Linear<u16>& args, int threads, Isa isa) { run(args, threads, isa); }
void linear(const Linear<float>& args, int threads, Isa isa) { run(args, threads, isa); }

}  // namespace ume
