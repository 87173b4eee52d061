// The only step of the top-k that looks at every score.
#pragma once

#include <cstdint>

#include "ume/cpu_features.h"

namespace ume {

// s[j] = s[j] * query[j] * candidate for j in [0, 16 chunks), query = nullptr meaning 1 for both;
// bit j % 16 of masks[j / 16] = not (s[j] <= threshold[j]). NaN on either side sets the bit.
// Returns whether any bit is set.
using TopkFilterFn = bool (*)(float* s, const float* query, float candidate,
                              const float* threshold, std::int64_t chunks, std::uint16_t* masks);

TopkFilterFn topk_filter(Isa isa);

}  // namespace ume
