// Scores of a single query. The tile engine has queries in the lanes of its vectors; here the
// lanes are candidates, so that one query fills them and the corpus is read as fast as memory is.
#pragma once

#include <cstdint>

#include "ume/cpu_features.h"
#include "ume/tile_engine.h"

namespace ume {

constexpr std::int64_t kDotRows = 8;  // candidates scored at a time, as many as vectors have lanes

// out[r] = a[r] . b over `words` words for r in [0, m); rows of A are stride bytes apart, and out
// holds m rounded up to kDotRows. The bits are those of the tile engine: lanes do not meet, each
// score is one madd per word in rising order.
using TopkDotsFn = void (*)(const void* a, std::int64_t stride, std::int64_t m,
                            const std::uint32_t* b, std::int64_t words, float* out);

// nullptr where there is no such path (no vectors, or matrix tiles, which add in another order).
TopkDotsFn topk_dots(Isa isa, Compute compute);

}  // namespace ume
