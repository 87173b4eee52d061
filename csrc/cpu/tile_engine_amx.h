// Loop nests of the tile engine over AMX tiles, in the calling convention of TileEngine.
#pragma once

#include <cstdint>

namespace ume {

struct AmxProducts {
  void (*multiply)(const void* a, std::int64_t row_stride_bytes, std::int64_t k_stride_bytes,
                   std::int64_t m, const std::uint32_t* b, std::int64_t kk, std::int64_t panels,
                   float* c, std::int64_t ldc, bool accumulate);
  void (*multiply_narrow)(const void* a, std::int64_t row_stride_bytes,
                          std::int64_t k_stride_bytes, std::int64_t m, const std::uint32_t* b,
                          std::int64_t kk, float* c, std::int64_t ldc, bool accumulate);
};

constexpr std::int64_t kAmxLanes = 32;  // columns of a panel: two tiles
constexpr std::int64_t kAmxRows = 32;   // rows of a block: two tiles

// The real instructions; null pointers when this compiler has none.
AmxProducts amx_products();

// The same code with the instructions replaced by loops.
AmxProducts amx_emulated_products();

}  // namespace ume
