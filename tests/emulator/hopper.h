// The instructions of sm_90a on the host, under the names of ume/cuda/ptx_sm90.cuh. What hardware
// leaves undefined is made to fail here:
//   - a copy's destination holds NaN from its issue until the barrier's phase completes, and the
//     data land late, after a number of polls that varies;
//   - accumulators hold NaN from the first product until wgmma_wait;
//   - a product reads its operands at issue and again when it is waited for; if they differ,
//     somebody overwrote them in flight and the program stops;
//   - arrivals and bytes beyond those a barrier expects stop the program.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "block.h"
#include "ume/element.h"

#define UME_SM90A 1

// What row_tiles() of ume/cuda/tensor_map.h returns here: a row-major matrix of 16-bit elements.
struct CUtensorMap {
  const void* data;
  std::int64_t rows, depth, row_stride;
  int box_rows;
};

namespace ume::cuda::sm90 {

using Barrier = std::uint64_t;

namespace hopper {

// What a barrier's 64 bits hold here.
struct BarrierState {
  std::uint16_t arrivals;    // per phase
  std::int16_t missing;      // in this phase
  std::int32_t bytes_phase;  // missing bytes * 2 + parity of the phase
};
static_assert(sizeof(BarrierState) == sizeof(Barrier), "a barrier is 64 bits");

struct Copy {
  Barrier* barrier;
  unsigned char* dst;
  CUtensorMap map;
  int x, y;
  int delay;  // polls of the barrier until it lands
};

struct Product {
  float* d;
  int blocks;
  std::uint64_t a, b;
  bool accumulate;
  float (*widen)(std::uint16_t);
  std::vector<float> result;  // of the operands as they were at issue
};

// Accumulators between their first product and the wait.
struct Shadow {
  float* d;
  std::vector<float> values;
};

struct Thread {
  std::vector<Product> products;   // in flight, oldest first
  std::vector<std::size_t> groups; // sizes of the committed groups, oldest first
  std::size_t open = 0;            // products not yet committed
  std::vector<Shadow> shadows;
  bool fenced = false;
};

struct NamedBarrier {
  int arrived = 0, turn = 0;
};

struct Block {
  NamedBarrier named[16];
  std::vector<Copy> copies;
  std::vector<Thread> threads;
  std::uint32_t random = 1;
};

inline void end_block();

inline Block& block() {
  static Block state;
  static const bool registered = [] {
    emulator::block().at_end.emplace_back(end_block);
    return true;
  }();
  (void)registered;
  return state;
}

inline Thread& thread() {
  Block& state = block();
  const std::size_t at = static_cast<std::size_t>(emulator::thread_index());
  if (state.threads.size() <= at) state.threads.resize(at + 1);
  return state.threads[at];
}

inline void require(bool good, const char* what) {
  if (!good) emulator::fail(what);
}

inline std::uint32_t swizzle(std::uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void settle(BarrierState& state) {
  if (state.missing != 0 || state.bytes_phase >> 1 != 0) return;
  state.missing = static_cast<std::int16_t>(state.arrivals);
  state.bytes_phase ^= 1;
  emulator::note_progress();
}

inline BarrierState& decode(Barrier* barrier) { return *reinterpret_cast<BarrierState*>(barrier); }

inline void land(const Copy& copy) {
  const unsigned char* base = emulator::shared_memory();
  const std::uint32_t start = static_cast<std::uint32_t>(copy.dst - base);
  for (int r = 0; r < copy.map.box_rows; ++r) {
    for (int k = 0; k < 64; ++k) {
      const std::int64_t row = std::int64_t{copy.y} + r, column = std::int64_t{copy.x} + k;
      std::uint16_t value = 0;
      if (row >= 0 && row < copy.map.rows && column >= 0 && column < copy.map.depth) {
        value = static_cast<const std::uint16_t*>(
            copy.map.data)[row * copy.map.row_stride + column];
      }
      const std::uint32_t address = swizzle(start + static_cast<std::uint32_t>(r * 128 + k * 2));
      std::memcpy(emulator::shared_memory() + address, &value, 2);
    }
  }
  BarrierState& state = decode(copy.barrier);
  state.bytes_phase -= copy.map.box_rows * 128 * 2;
  settle(state);
}

// One poll of a barrier: its copies come closer and the due ones land.
inline void poll(Barrier* barrier) {
  std::vector<Copy>& copies = block().copies;
  for (std::size_t i = 0; i < copies.size();) {
    if (copies[i].barrier != barrier || copies[i].delay-- > 0) {
      ++i;
      continue;
    }
    const Copy due = copies[i];
    copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
    land(due);
  }
}

// Element (row, k) of the tile that a descriptor names.
inline std::uint16_t operand(std::uint64_t descriptor, int row, int k) {
  const std::uint32_t start = static_cast<std::uint32_t>(descriptor & 0x3fff) << 4;
  const std::uint32_t group = static_cast<std::uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  require(descriptor >> 62 == 1, "descriptor: not a 128-byte swizzle");
  require((descriptor >> 49 & 7) == 0, "descriptor: base offset");
  const std::uint32_t address =
      start + static_cast<std::uint32_t>(row / 8) * group +
      static_cast<std::uint32_t>(row % 8 * 128 + k * 2);
  std::uint16_t value;
  std::memcpy(&value, emulator::shared_memory() + swizzle(address), 2);
  return value;
}

// This thread's part of one product, [blocks][4].
inline std::vector<float> evaluate(const Product& product) {
  const int lane = emulator::thread_index() % 32, warp = emulator::thread_index() / 32 % 4;
  float a[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      a[half][k] = product.widen(operand(product.a, 16 * warp + lane / 4 + 8 * half, k));
    }
  }
  std::vector<float> result(static_cast<std::size_t>(product.blocks) * 4);
  for (int n = 0; n < product.blocks; ++n) {
    for (int pair = 0; pair < 2; ++pair) {
      float b[16];
      for (int k = 0; k < 16; ++k) {
        b[k] = product.widen(operand(product.b, 8 * n + lane % 4 * 2 + pair, k));
      }
      for (int half = 0; half < 2; ++half) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[half][k] * b[k];
        result[static_cast<std::size_t>(n * 4 + half * 2 + pair)] = sum;
      }
    }
  }
  return result;
}

inline Shadow* shadow_of(Thread& t, const float* d) {
  for (Shadow& shadow : t.shadows) {
    if (shadow.d == d) return &shadow;
  }
  return nullptr;
}

inline void complete(Thread& t, const Product& product) {
  const std::vector<float> now = evaluate(product);
  require(std::memcmp(now.data(), product.result.data(), now.size() * sizeof(float)) == 0,
          "shared memory changed under a product in flight");
  Shadow& shadow = *shadow_of(t, product.d);
  for (std::size_t i = 0; i < now.size(); ++i) {
    shadow.values[i] = (product.accumulate ? shadow.values[i] : 0.0f) + now[i];
  }
}

inline void issue(float* d, int blocks, std::uint64_t a, std::uint64_t b, bool accumulate,
                  float (*widen)(std::uint16_t)) {
  Thread& t = thread();
  require(t.fenced, "product without wgmma_fence");
  const std::size_t count = static_cast<std::size_t>(blocks) * 4;
  if (shadow_of(t, d) == nullptr) t.shadows.push_back({d, std::vector<float>(d, d + count)});
  for (std::size_t i = 0; i < count; ++i) d[i] = std::numeric_limits<float>::quiet_NaN();
  Product product{d, blocks, a, b, accumulate, widen, {}};
  product.result = evaluate(product);
  t.products.push_back(product);
  ++t.open;
}

inline void wait(std::size_t pending) {
  Thread& t = thread();
  while (t.groups.size() > pending) {
    for (std::size_t i = 0; i < t.groups.front(); ++i) complete(t, t.products[i]);
    t.products.erase(t.products.begin(),
                     t.products.begin() + static_cast<std::ptrdiff_t>(t.groups.front()));
    t.groups.erase(t.groups.begin());
  }
  if (!t.products.empty()) return;
  for (const Shadow& shadow : t.shadows) {
    std::memcpy(shadow.d, shadow.values.data(), shadow.values.size() * sizeof(float));
  }
  t.shadows.clear();
}

// After a block: nothing may be left in flight.
inline void end_block() {
  Block& state = block();
  bool left = !state.copies.empty();
  for (const Thread& t : state.threads) left = left || !t.products.empty();
  const std::uint32_t random = state.random;
  state = Block();
  state.random = random;
  if (left) throw std::runtime_error("a block ended with copies or products in flight");
}

}  // namespace hopper

inline unsigned char* shared_memory() { return emulator::shared_memory(); }

inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) -
                                    emulator::shared_memory());
}

inline void barrier_init(Barrier* barrier, int arrivals) {
  hopper::decode(barrier) = {static_cast<std::uint16_t>(arrivals),
                             static_cast<std::int16_t>(arrivals), 0};
}

inline void barrier_init_fence() {}

inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
  hopper::BarrierState& state = hopper::decode(barrier);
  hopper::require(state.missing > 0, "more arrivals than the barrier expects");
  state.bytes_phase += bytes * 2;
  --state.missing;
  hopper::settle(state);
}

inline void barrier_arrive(Barrier* barrier) { barrier_arrive_expect(barrier, 0); }

inline void barrier_wait(Barrier* barrier, std::uint32_t parity) {
  for (;;) {
    hopper::poll(barrier);
    if (static_cast<std::uint32_t>(hopper::decode(barrier).bytes_phase & 1) != parity) return;
    emulator::yield();
  }
}

inline void named_barrier(int id, int threads) {
  hopper::NamedBarrier& barrier = hopper::block().named[id];
  const int turn = barrier.turn;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.turn;
    emulator::note_progress();
    return;
  }
  while (barrier.turn == turn) emulator::yield();
}

inline void prefetch_tensor_map(const CUtensorMap*) {}
inline std::uint64_t keep_in_l2() { return 0; }
inline std::uint64_t stream_through_l2() { return 0; }

inline void copy_box(void* dst, const CUtensorMap* map, Barrier* barrier, int x, int y,
                     std::uint64_t) {
  hopper::require(shared_address(dst) % 1024 == 0, "copy_box: destination not 1024-byte aligned");
  std::memset(dst, 0xff, static_cast<std::size_t>(map->box_rows) * 128);
  hopper::Block& state = hopper::block();
  state.random = state.random * 1664525u + 1013904223u;
  state.copies.push_back({barrier, static_cast<unsigned char*>(dst), *map, x, y,
                          static_cast<int>(state.random >> 28) % 4});
}

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void release_registers() {}

inline void wgmma_fence() { hopper::thread().fenced = true; }
inline void wgmma_commit() {
  hopper::Thread& t = hopper::thread();
  t.groups.push_back(t.open);
  t.open = 0;
  t.fenced = false;
}
// A warp waits as one: no lane goes on before the products of all of them have read their operands.
template <int kPending>
void wgmma_wait() {
  hopper::wait(kPending);
  emulator::exchange(0);
}

template <int kBlocks>
void pin_registers(float (&)[kBlocks][4]) {}

template <typename T>
struct Wgmma {
  template <int kBlocks>
  static void multiply(float (&d)[kBlocks][4], std::uint64_t a, std::uint64_t b, bool accumulate) {
    hopper::issue(&d[0][0], kBlocks, a, b, accumulate, emulator::widen<T>);
  }
};

}  // namespace ume::cuda::sm90
