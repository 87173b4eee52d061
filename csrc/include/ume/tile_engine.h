// Dense products C = A B on the CPU: the loop nest that the contrastive loss and the top-k share.
//
// Everything is counted in 32-bit words along the inner dimension. A word is one fp32
// (Compute::kFloat32) or two neighbouring bf16 (Compute::kBFloat16); accumulation is fp32.
//
//   A  rows that are read where they lie: word (r, kk) at a + r * row_stride + kk * k_stride,
//      strides in bytes, 2-byte alignment suffices.
//   B  packed into panels of `lanes` columns: word (kk, col) of a panel at panel[kk * lanes + col],
//      panels one after the other, the last one filled with zero columns. (Their products are
//      written too: 0, or NaN for a row of A with NaN or infinity.)
//
// Each output is accumulated over kk in one fixed order that depends on kk, the kind of word and
// the instruction set only: it is bit-identical wherever it stands and whatever surrounds it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "ume/cpu_features.h"
#include "ume/element.h"

namespace ume {

enum class Compute { kFloat32 = 0, kBFloat16 = 1 };

// The kind of word for a product of these two element types: bf16 words when both are bf16 and
// `isa` multiplies them, else everything is widened to fp32.
Compute compute_for(Isa isa, Element a, Element b);

// Words that hold k elements; an odd last bf16 is paired with a zero.
constexpr std::int64_t word_count(Compute compute, std::int64_t k) {
  return compute == Compute::kBFloat16 ? (k + 1) / 2 : k;
}

struct TileEngine {
  const char* name;
  Compute compute;
  std::int64_t lanes;  // columns of a panel
  std::int64_t rows;   // a multiple of this many rows of A wastes nothing

  // c[m, panels * lanes] = (or += if accumulate) A[m, kk] B[kk, panels * lanes]; row stride ldc in
  // floats.
  void (*multiply)(const void* a, std::int64_t row_stride_bytes, std::int64_t k_stride_bytes,
                   std::int64_t m, const std::uint32_t* b, std::int64_t kk, std::int64_t panels,
                   float* c, std::int64_t ldc, bool accumulate);

  // The same for the first narrow_lanes columns of a single panel: c[m, narrow_lanes]. Half the
  // work when B has few columns; the same bits.
  std::int64_t narrow_lanes;
  void (*multiply_narrow)(const void* a, std::int64_t row_stride_bytes,
                          std::int64_t k_stride_bytes, std::int64_t m, const std::uint32_t* b,
                          std::int64_t kk, float* c, std::int64_t ldc, bool accumulate);

  // The rows of src become the columns of B: B = src^T, packed into
  // packed_words(src.rows, src.columns) words.
  void (*pack_vectors)(std::uint32_t* out, const MatrixView& src);

  // src [K, n] becomes B itself; packed_words(src.columns, src.rows) words.
  void (*pack_matrix)(std::uint32_t* out, const MatrixView& src);

  // The rows of src as rows of A, words(src.columns) words each and nothing between them. For
  // sources of which reads_in_place() is false.
  void (*stage_rows)(std::uint32_t* out, const MatrixView& src);

  std::int64_t words(std::int64_t k) const { return word_count(compute, k); }
  std::int64_t panels(std::int64_t columns) const { return (columns + lanes - 1) / lanes; }
  std::int64_t packed_words(std::int64_t columns, std::int64_t k) const {
    return panels(columns) * lanes * words(k);
  }
  // Whether rows of k such elements can be A as they lie: row_stride = the matrix's, k_stride = 4.
  bool reads_in_place(Element element, std::int64_t k) const {
    if (compute == Compute::kFloat32) return element == Element::kFloat32;
    return element == Element::kBFloat16 && k % 2 == 0;
  }
};

// Throws std::invalid_argument when this machine, this build or `isa` has no such path. The bf16
// engine exists where compute_for() says so and widens nothing: its sources must be bf16.
const TileEngine& tile_engine(Compute compute, Isa isa);

// Uninitialised scratch memory on a cache line; grows, never keeps its contents.
template <typename T>
class ScratchBuffer {
 public:
  ScratchBuffer() = default;
  explicit ScratchBuffer(std::int64_t count) { reserve(count); }

  T* reserve(std::int64_t count) {
    if (count > capacity_) {
      const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
      memory_.reset();
      capacity_ = 0;
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (memory_ == nullptr) throw std::bad_alloc();
      capacity_ = count;
    }
    return memory_.get();
  }
  T* data() { return memory_.get(); }
  const T* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
  std::int64_t capacity_ = 0;
};

}  // namespace ume
