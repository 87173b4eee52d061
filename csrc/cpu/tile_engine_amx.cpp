// Matrix tiles of AMX: eight of 16 rows of 64 bytes. A block of 32 x 32 outputs takes four tiles, a
// pair of row tiles and a pair of column tiles the other four, so each loaded tile is used twice.
// Panels of bf16 words are the layout that the instruction wants, and rows of A are read in place.
#include "tile_engine_amx.h"

#include <algorithm>
#include <cstring>

#include "ume/element.h"

namespace ume {
namespace {

using i64 = std::int64_t;
using u32 = std::uint32_t;

constexpr int kTile = 16;  // rows of a tile, and words in each

#ifdef UME_HAS_AMX_COMPILER

// Tile registers belong to this file: no compiler keeps anything in them. Instructions are spelled
// out because the macros of GCC take no template arguments as tile numbers.
namespace hardware {
struct Tiles {
  Tiles() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = 64;
      config.rows[t] = kTile;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int T>
  UME_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  UME_INLINE void load(const void* p, i64 stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(T) : "memory");
  }
  template <int T>
  UME_INLINE void store(void* p, i64 stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(T) : "memory");
  }
  // C += A B: word (r, k) of A holds two neighbouring bf16 of row r, word (k, j) of B the two of
  // column j.
  template <int C, int A, int B>
  UME_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
#include "tile_engine_amx.inc"
}  // namespace hardware

#endif

namespace emulated {
struct Tiles {
  u32 word[8][kTile][kTile];

  template <int T>
  void zero() {
    std::memset(word[T], 0, sizeof word[T]);
  }
  template <int T>
  void load(const void* p, i64 stride_bytes) {
    for (int r = 0; r < kTile; ++r)
      std::memcpy(word[T][r], static_cast<const char*>(p) + r * stride_bytes, sizeof word[T][r]);
  }
  template <int T>
  void store(void* p, i64 stride_bytes) {
    for (int r = 0; r < kTile; ++r)
      std::memcpy(static_cast<char*>(p) + r * stride_bytes, word[T][r], sizeof word[T][r]);
  }
  template <int C, int A, int B>
  void multiply() {
    for (int r = 0; r < kTile; ++r)
      for (int k = 0; k < kTile; ++k)
        for (int j = 0; j < kTile; ++j) {
          const u32 a = word[A][r][k], b = word[B][k][j];
          float sum;
          std::memcpy(&sum, &word[C][r][j], sizeof sum);
          sum += low(a) * low(b);
          sum += high(a) * high(b);
          std::memcpy(&word[C][r][j], &sum, sizeof sum);
        }
  }

  static float low(u32 w) { return from_bf16(static_cast<std::uint16_t>(w)); }
  static float high(u32 w) { return from_bf16(static_cast<std::uint16_t>(w >> 16)); }
};
#include "tile_engine_amx.inc"
}  // namespace emulated

}  // namespace

AmxProducts amx_products() {
#ifdef UME_HAS_AMX_COMPILER
  return {hardware::multiply, hardware::multiply_narrow};
#else
  return {nullptr, nullptr};
#endif
}

AmxProducts amx_emulated_products() { return {emulated::multiply, emulated::multiply_narrow}; }

}  // namespace ume
