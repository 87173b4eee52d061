// The block program that every sm_90a kernel of q p^T shares; see mainloop_sm90.cuh.
//
// A Problem says what is computed:
//   Element, kTileColumns, kStages  of the main loop
//   kProducerRegisters              24 or 40: what the walk over the tiles takes
//   Params                          passed by value
//   depth(params)                   elements of a row
//   Tiles(params, block, blocks)    the tiles of one block in order: bool next(), then row() and
//                                   column(), first row of q and first row of p
//   Epilogue(params, shared, tiles, group, thread)
//                                   one per consumer thread, `thread` of 128 in a group that owns
//                                   64 rows and an Epilogue::Shared: load() during the products
//                                   of a tile, tile(products), and after the last finish()
#pragma once

#include "ume/cuda/mainloop_sm90.cuh"
#include "ume/cuda/tile_layout.cuh"

namespace ume::cuda::sm90 {

// Barrier among the threads of one consumer group. Groups never wait for each other: while one is
// in its epilogue, the tensor cores work for the other.
struct GroupSync {
  static __device__ __forceinline__ void sync() {
    named_barrier(static_cast<int>(threadIdx.x) / 128, 128);
  }
};

// Of a group's 64 x kTileColumns products, warp w has rows 16 w to 16 w + 15.
template <int kTileColumns>
using GroupLayout = TileLayout<4, 1, 1, kTileColumns / 8>;

template <class Problem>
using LoopOf = MainLoop<typename Problem::Element, Problem::kTileColumns, Problem::kStages>;

template <class Problem>
constexpr int kSharedBytesOf =
    LoopOf<Problem>::kSharedBytes +
    kConsumerGroups * static_cast<int>(sizeof(typename Problem::Epilogue::Shared));

__device__ __forceinline__ int depth_steps(std::int64_t depth) {
  return static_cast<int>((depth + kTileDepth - 1) / kTileDepth);
}

template <class Problem>
__device__ __forceinline__ void run_block(const CUtensorMap& q, const CUtensorMap& p,
                                          const typename Problem::Params& params) {
  using Loop = LoopOf<Problem>;
  static_assert(kSharedBytesOf<Problem> <= 227 * 1024, "shared memory of a block of sm_90");
  unsigned char* shared = shared_memory();
  Loop loop(shared);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    prefetch_tensor_map(&q);
    prefetch_tensor_map(&p);
    loop.initialise();
  }
  __syncthreads();

  // Each role computes what it needs itself: a value from before the branch would have to live in a
  // register of the producer's few.
  using Tiles = typename Problem::Tiles;
  typename Loop::Position at;
  if (thread < 128) {
    release_registers<Problem::kProducerRegisters>();
    if (thread == 0) {
      Tiles tiles(params, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
      const int steps = depth_steps(Problem::depth(params));
      const std::uint64_t keep = keep_in_l2(), stream = stream_through_l2();
      while (tiles.next()) {
        loop.load(&q, &p, tiles.row(), tiles.column(), steps, keep, stream, at);
      }
    }
  } else {
    take_registers<kConsumerRegisters<Problem::kProducerRegisters>>();
    using Epilogue = typename Problem::Epilogue;
    const int group = thread / 128 - 1;
    auto* const groups = reinterpret_cast<typename Epilogue::Shared*>(shared + Loop::kSharedBytes);
    Tiles tiles(params, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    const int steps = depth_steps(Problem::depth(params));
    Epilogue epilogue(params, groups[group], tiles, group, thread % 128);
    typename Loop::Accumulators d;
    while (tiles.next()) {
      loop.multiply(d, group, thread % 32, steps, at, [&] { epilogue.load(); });
      epilogue.tile(d);
    }
    epilogue.finish();
  }
}

}  // namespace ume::cuda::sm90
