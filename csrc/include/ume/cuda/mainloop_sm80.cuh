// Products q p^T tile by tile for sm_80 and newer: 128 rows of q, and of p one 128-row tile after
// the other, through a ring of stages that asynchronous copies fill three steps ahead, across the
// borders of tiles, so that copies run on under an epilogue.
//
// A stage holds 32 elements (64 bytes) of each row. Two rows share the 128 bytes that shared memory
// serves at once; the 16-byte chunks of a row pair are permuted by an exclusive or, so that the
// eight rows of an ldmatrix, and the eight chunks that neighbouring threads copy, lie in different
// banks.
//
// Eight warps hold 64 x 32 scores each, in 64 registers; with at most 128 registers and 64 KB of
// stages per block two blocks share a multiprocessor, and one multiplies while the other is in its
// epilogue.
#pragma once

#include <cstdint>

#include "ume/cuda/ptx_sm80.cuh"
#include "ume/cuda/tile_layout.cuh"

namespace ume::cuda::sm80 {

using Tile = TileLayout<2, 4, 4, 4>;
static_assert(Tile::kHeight == 128 && Tile::kWidth == 128 && Tile::kThreads == 256);

inline constexpr int kBlocksPerMultiprocessor = 2;
inline constexpr int kStepDepth = 32;
inline constexpr int kStages = 4;
inline constexpr int kOperandBytes = 128 * kStepDepth * 2;
inline constexpr int kStageBytes = 2 * kOperandBytes;
inline constexpr int kRingBytes = kStages * kStageBytes;

// Rows of a matrix of 16-bit elements; the first is aligned to 16 bytes, as is the stride.
struct Rows {
  const void* data;
  std::int64_t rows, stride;  // stride in elements
};

// Byte of a chunk within an operand. Rows 8 apart are permuted alike.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * (kStepDepth * 2) + (chunk ^ (row / 2 & 3)) * 16;
}

template <typename T>
class MainLoop {
 public:
  // Starts copying: the rows of q from row0, those of `tiles` tiles of p from col0. `ring` is
  // kRingBytes of shared memory.
  __device__ __forceinline__ MainLoop(unsigned char* ring, const Rows& q, const Rows& p,
                                      std::int64_t depth, int row0, int col0, int tiles, int thread)
      : ring_(ring),
        q_stride_(q.stride),
        p_stride_(p.stride),
        depth_(static_cast<int>(depth)),
        tiles_left_(tiles) {
    const Tile tile(thread);
    q_read_ = chunk_offset(tile.warp_row * 64 + tile.lane % 16, tile.lane / 16);
    p_read_ = chunk_offset(tile.warp_column * 32 + tile.lane / 16 * 8 + tile.lane % 8,
                           tile.lane / 8 % 2);
    // A thread copies one chunk of rows `row` and `row` + 64.
    const int row = thread / 4, chunk = thread % 4;
    write_ = chunk_offset(row, chunk);
    chunk_start_ = chunk * 8;
    q_left_ = static_cast<int>(q.rows - row0 - row);
    p_left_ = static_cast<int>(p.rows - col0 - row);
    q_ = static_cast<const T*>(q.data) + static_cast<std::int64_t>(row0 + row) * q.stride +
         chunk_start_;
    p_ = static_cast<const T*>(p.data) + static_cast<std::int64_t>(col0 + row) * p.stride +
         chunk_start_;
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) copy_step();
  }

  // The products of the next tile, by all threads of the block.
  __device__ __forceinline__ void multiply_tile(Tile::Scores& s) {
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[block][e] = 0.0f;
    }
#pragma unroll 1
    for (int depth = 0; depth < depth_; depth += kStepDepth) {
      copy_wait<kStages - 2>();
      __syncthreads();  // everybody's copies are there, and nobody reads the stage before
      copy_step();
      multiply_step(s);
      read_stage_ = read_stage_ + 1 == kStages ? 0 : read_stage_ + 1;
    }
  }

  // After the last tile.
  __device__ __forceinline__ void finish() { copy_wait<0>(); }

 private:
  // An empty group past the end, so that groups can be counted.
  __device__ __forceinline__ void copy_step() {
    if (tiles_left_ > 0) {
      unsigned char* const stage = ring_ + write_stage_ * kStageBytes + write_;
      const bool within = load_depth_ + chunk_start_ < depth_;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        copy_async(stage + half * (kOperandBytes / 2), q_ + half * 64 * q_stride_,
                   within && q_left_ > half * 64);
        copy_async(stage + half * (kOperandBytes / 2) + kOperandBytes, p_ + half * 64 * p_stride_,
                   within && p_left_ > half * 64);
      }
      q_ += kStepDepth;
      p_ += kStepDepth;
      load_depth_ += kStepDepth;
      if (load_depth_ >= depth_) {
        q_ -= load_depth_;
        p_ += Tile::kWidth * p_stride_ - load_depth_;
        p_left_ -= Tile::kWidth;
        load_depth_ = 0;
        --tiles_left_;
      }
      write_stage_ = write_stage_ + 1 == kStages ? 0 : write_stage_ + 1;
    }
    copy_commit();
  }

  __device__ __forceinline__ void multiply_step(Tile::Scores& s) {
    const unsigned char* const stage = ring_ + read_stage_ * kStageBytes;
#pragma unroll
    for (int k = 0; k < kStepDepth / 16; ++k) {
      // Two chunks on: the permutation turns that into an exclusive or, too.
      const unsigned char* const q = stage + (q_read_ ^ k * 32);
      const unsigned char* const p = stage + kOperandBytes + (p_read_ ^ k * 32);
      std::uint32_t b[2][4];  // left and right halves of two neighbouring column blocks
#pragma unroll
      for (int n = 0; n < 2; ++n) load_matrices(b[n], p + n * 16 * kStepDepth * 2);
#pragma unroll
      for (int m = 0; m < Tile::kRowBlocks; ++m) {
        std::uint32_t a[4];
        load_matrices(a, q + m * 16 * kStepDepth * 2);
#pragma unroll
        for (int n = 0; n < Tile::kColumnBlocks; ++n) {
          multiply<T>(s[m * Tile::kColumnBlocks + n], a, b[n / 2][n % 2 * 2],
                      b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  }

  unsigned char* ring_;
  std::int64_t q_stride_, p_stride_;
  int depth_, tiles_left_;  // tiles that are not wholly under way
  const T *q_, *p_;         // what this thread copies next
  int q_left_, p_left_;     // rows from there to the last
  int q_read_, p_read_, write_, chunk_start_;
  int load_depth_ = 0, write_stage_ = 0, read_stage_ = 0;
};

}  // namespace ume::cuda::sm80
