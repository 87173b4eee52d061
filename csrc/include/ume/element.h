// Element types of the tensors that arrive from Python, and how one element is widened.
#pragma once

#include <cstdint>
#include <cstring>

#include "ume/simd.h"

namespace ume {

enum class Element { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr std::int64_t element_size(Element element) {
  return element == Element::kFloat32 ? 4 : 2;
}

// A row-major matrix that somebody else owns.
struct MatrixView {
  const void* data;
  Element element;
  std::int64_t rows, columns;
  std::int64_t row_stride;  // in elements; the elements of a row are neighbours

  const void* row(std::int64_t r) const {
    return static_cast<const char*>(data) + r * row_stride * element_size(element);
  }
};

UME_INLINE float from_bf16(std::uint16_t v) {
  const std::uint32_t bits = static_cast<std::uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Round to nearest even; NaN stays NaN.
UME_INLINE std::uint16_t to_bf16(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Exact, subnormal numbers included; branch-free so that loops over it vectorise.
UME_INLINE float from_fp16(std::uint16_t v) {
  const std::uint32_t sign = static_cast<std::uint32_t>(v & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(v & 0x7fffu) << 13;
  // Read with the exponent bias of fp32, the number is 2^112 times too small: one exact
  // multiplication puts that right and makes subnormal numbers normal.
  float f;
  std::memcpy(&f, &magnitude, sizeof f);
  f *= 5.192296858534828e33f;
  std::uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  bits |= sign;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

}  // namespace ume
