// Persistent warp-specialised product s = q p^T for sm_90a: tile after tile of 128 rows x 256 (or
// 128) columns, whose accumulators go to an epilogue and never to memory.
//
//   warp group 0      one thread keeps the copy engine busy: boxes of q (128 x 64) and p (256 x 64)
//                     into a ring of stages, as far ahead as the ring allows, across tile borders
//   warp groups 1, 2  64 rows each: wgmma m64n256k16 on the stages, then the epilogue from
//                     registers, while the ring fills up with the next tile
//
// Each stage has two barriers: `full` (one arrival, the bytes of both boxes) and `empty` (one
// arrival per consumer warp). The two consumers share p and nothing else, so one may run ahead of
// the other by the depth of the ring: part of its epilogue then hides behind the other's products.
//
// Roofline of one multiprocessor (H200: 132 of them, 1.83 GHz at 989 dense TFLOP/s, which is 2048
// multiply-adds per clock), 128 x 256 tile, one step of 64:
//   tensor cores    128 * 256 * 64 / 2048                             = 1024 clocks
//   shared memory   read 2 * (64 + 256) * 128 B, 80 B per clock; written 48 KB, 48 B per clock.
//                   With tiles of 128 columns 96 + 64: hence 256, which is also the widest wgmma
//   L2              48 KB, 48 B per clock; all of them 6.3 KB per clock, 11.6 TB/s at full rate,
//                   about 7 at 60 %. The tightest resource after the tensor cores; blocks in pairs
//                   that multicast p would need two thirds of it
//   memory          see tile_order_sm90.cuh: below 1 TB/s of 4.8
// A tile at depth 1536 is 24 steps, 24.6 k clocks. An epilogue of x instructions per accumulator
// takes 32768 x / 128 lanes = 256 x clocks of the schedulers, 1 % of the tile for each instruction;
// an exponential per accumulator 2048 clocks of its own units beside them. Per accumulator: top-k
// about 2 instructions, row and column sums 9 and one exponential, gradient factors 14 and two. Of
// that up to the ring's 4096 clocks of work are hidden as long as the consumers are apart; if
// nothing is, the tensor cores wait 2, 9 and 17 % of the time.
#pragma once

#include <cstdint>

#include "ume/cuda/ptx_sm90.cuh"

namespace ume::cuda::sm90 {

constexpr int kConsumerGroups = 2;
constexpr int kConsumerThreads = kConsumerGroups * 128;
constexpr int kThreads = 128 + kConsumerThreads;
constexpr int kTileRows = kConsumerGroups * 64;
constexpr int kTileDepth = 64;  // 128 bytes: one row of the swizzle

// A block is launched with 65536 / 384 = 168 registers per thread. What the producer gives back is
// just what the consumers take, so that the exchange never has to wait.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
template <int kProducerRegisters>
constexpr int kConsumerRegisters =
    (kLaunchRegisters * kThreads - kProducerRegisters * 128) / kConsumerThreads;
static_assert(kConsumerRegisters<24> == 240 && kConsumerRegisters<40> == 232, "multiples of 8");

// A position in the ring of stages; the parity flips at every turn.
template <int kStages>
struct Cursor {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename T, int kTileColumns, int kStages>
struct MainLoop {
  static_assert(sizeof(T) == 2, "16-bit operands");
  static constexpr int kRowBytes = kTileDepth * 2;
  static constexpr int kQBytes = kTileRows * kRowBytes;
  static constexpr int kStageBytes = kQBytes + kTileColumns * kRowBytes;
  static constexpr int kBarrierBytes = 2 * kStages * static_cast<int>(sizeof(Barrier));
  // Tiles first: the swizzle wants them 1024-byte aligned.
  static constexpr int kSharedBytes = kStages * kStageBytes + kBarrierBytes;
  static constexpr int kBlocks = kTileColumns / 8;

  using Accumulators = float[kBlocks][4];
  using Position = Cursor<kStages>;

  unsigned char* tiles;
  Barrier* full;
  Barrier* empty;

  __device__ __forceinline__ explicit MainLoop(unsigned char* shared)
      : tiles(shared),
        full(reinterpret_cast<Barrier*>(shared + kStages * kStageBytes)),
        empty(full + kStages) {}

  // By one thread, before the block synchronises.
  __device__ __forceinline__ void initialise() {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, kConsumerThreads / 32);
    }
    barrier_init_fence();
  }

  // Producer, one thread: the boxes of one tile.
  __device__ __forceinline__ void load(const CUtensorMap* q, const CUtensorMap* p, int row,
                                       int column, int steps, std::uint64_t q_policy,
                                       std::uint64_t p_policy, Position& at) {
    for (int step = 0; step < steps; ++step) {
      // The first turn finds every stage empty: the phase "before" phase 0 has completed.
      barrier_wait(empty + at.stage, at.parity ^ 1);
      unsigned char* stage = tiles + at.stage * kStageBytes;
      barrier_arrive_expect(full + at.stage, kStageBytes);
      copy_box(stage, q, full + at.stage, step * kTileDepth, row, q_policy);
      copy_box(stage + kQBytes, p, full + at.stage, step * kTileDepth, column, p_policy);
      at.advance();
    }
  }

  // Consumer warp group `group`: the 64 x kTileColumns products of one tile. during() runs while
  // the tensor cores are at the first of them.
  template <class During>
  __device__ __forceinline__ void multiply(Accumulators& d, int group, int lane, int steps,
                                           Position& at, During during) {
    issue(d, group, false, at);
    during();
    int last = at.stage;
    at.advance();
    for (int step = 1; step < steps; ++step) {
      issue(d, group, true, at);
      wgmma_wait<1>();  // the products before these have read their stage
      release(last, lane);
      last = at.stage;
      at.advance();
    }
    wgmma_wait<0>();
    pin_registers(d);
    release(last, lane);
  }

 private:
  __device__ __forceinline__ void issue(Accumulators& d, int group, bool accumulate, Position at) {
    unsigned char* stage = tiles + at.stage * kStageBytes;
    const std::uint64_t a = tile_descriptor(stage + group * 64 * kRowBytes);
    const std::uint64_t b = tile_descriptor(stage + kQBytes);
    barrier_wait(full + at.stage, at.parity);
    pin_registers(d);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileDepth / 16; ++k) {
      Wgmma<T>::multiply(d, a + k * kDescriptorStep, b + k * kDescriptorStep, accumulate || k > 0);
    }
    wgmma_commit();
    pin_registers(d);
  }

  __device__ __forceinline__ void release(int stage, int lane) {
    if (lane == 0) barrier_arrive(empty + stage);
  }
};

}  // namespace ume::cuda::sm90
