// Runs a block of device code on the host, so that kernels can be tested where there is no GPU.
//
// Every thread is a fiber that runs until it waits for others. The order in which the fibers get
// their turn changes from round to round, and one warp at a time is held back for a while: code
// that relies on an order, for want of a barrier, gives different results or reads NaN, which is
// what shared memory holds when a block starts. Warp functions wait for all 32 lanes; a block in
// which everybody waits stops with a message.
//
// Include this (or ampere.h, hopper.h) through ume/cuda/*.cuh, compiled with -DUME_EMULATE.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ume/element.h"

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct uint4 {
  std::uint32_t x, y, z, w;
};
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
  return {x, y, z, w};
}

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __half {
  std::uint16_t bits;
};

namespace emulator {

inline constexpr std::size_t kSharedBytes = 227 * 1024;  // what a block can have on sm_90
inline constexpr std::size_t kStackBytes = 256 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};

// Lanes of a warp that exchange 64-bit words, in turns; two turns can overlap, three cannot.
struct Warp {
  std::uint64_t words[2][32];
  int arrived = 0;
  unsigned turn = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  std::function<void()> body;
  int current = 0, waiting = 0;
  unsigned turn = 0;
  std::uint64_t progress = 0;  // barriers passed and fibers ended
  std::string failure;
  std::vector<std::function<void()>> at_end;  // checks when a block has ended
};

inline Block& block() {
  static Block state;
  return state;
}

inline unsigned char* shared_memory() {
  alignas(1024) static unsigned char memory[kSharedBytes];
  return memory;
}

inline int thread_index() { return block().current; }

// Lets the other threads have a turn.
inline void yield() {
  Block& state = block();
  swapcontext(&state.fibers[static_cast<std::size_t>(state.current)].context, &state.scheduler);
}

// Something happened that others may wait for.
inline void note_progress() { ++block().progress; }

// Stops the block: run() throws.
[[noreturn]] inline void fail(const std::string& what) {
  Block& state = block();
  state.failure = what + " (block " + std::to_string(blockIdx.x) + ", " +
                  std::to_string(blockIdx.y) + ", thread " + std::to_string(state.current) + ")";
  for (;;) yield();
}

inline void enter() {
  Block& state = block();
  state.body();
  state.fibers[static_cast<std::size_t>(state.current)].done = true;
  note_progress();
  for (;;) yield();
}

// Runs one block of `threads` threads.
inline void run(int threads, std::function<void()> body) {
  Block& state = block();
  state.body = std::move(body);
  state.fibers.resize(static_cast<std::size_t>(threads));
  state.warps.assign(static_cast<std::size_t>(threads + 31) / 32, Warp());
  state.waiting = 0;
  state.failure.clear();
  blockDim = dim3(static_cast<unsigned>(threads));
  std::memset(shared_memory(), 0xff, kSharedBytes);
  for (Fiber& fiber : state.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  std::uint32_t random = 1;
  int idle = 0, held_warp = 0, held_rounds = 0;
  for (int left = threads; left > 0;) {
    const std::uint64_t before = state.progress;
    random = random * 1664525u + 1013904223u;
    const int start = static_cast<int>(random >> 8) % threads;
    const int step = (random & 0x80u) != 0 ? 1 : threads - 1;
    if (held_rounds-- == 0) {
      held_warp = static_cast<int>(random >> 16) % static_cast<int>(state.warps.size());
      held_rounds = static_cast<int>(random >> 10) % 32;
    }
    left = 0;
    for (int i = 0, at = start; i < threads; ++i, at = (at + step) % threads) {
      Fiber& fiber = state.fibers[static_cast<std::size_t>(at)];
      if (fiber.done) continue;
      ++left;
      if (at / 32 == held_warp) continue;
      state.current = at;
      threadIdx = dim3(static_cast<unsigned>(at));
      swapcontext(&state.scheduler, &fiber.context);
      if (!state.failure.empty()) throw std::runtime_error(state.failure);
    }
    // Copies that land late are progress nobody notes: give them some rounds.
    idle = state.progress == before ? idle + 1 : 0;
    if (idle > 1000) throw std::runtime_error("every thread waits: a barrier is missed by some");
  }
  for (const auto& check : state.at_end) check();
}

// Runs the blocks of a grid one after the other.
inline void launch(dim3 grid, int threads, const std::function<void()>& body) {
  gridDim = grid;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      run(threads, body);
    }
  }
}

// Every lane gives a word and gets all 32.
inline const std::uint64_t* exchange(std::uint64_t word) {
  Block& state = block();
  const int thread = state.current;
  Warp& warp = state.warps[static_cast<std::size_t>(thread / 32)];
  const unsigned turn = warp.turn;
  warp.words[turn % 2][thread % 32] = word;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.turn;
    note_progress();
  } else {
    while (warp.turn == turn) yield();
  }
  return warp.words[turn % 2];
}

template <typename T>
std::uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8, "at most 64 bits at a time");
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}
template <typename T>
T from_word(std::uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline void require_all_lanes(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp function without all lanes");
}

// 16-bit elements.
template <typename T>
float widen(std::uint16_t bits);
template <>
inline float widen<__nv_bfloat16>(std::uint16_t bits) {
  return ume::from_bf16(bits);
}
template <>
inline float widen<__half>(std::uint16_t bits) {
  return ume::from_fp16(bits);
}

template <typename T>
std::uint16_t narrow(float value);
template <>
inline std::uint16_t narrow<__nv_bfloat16>(float value) {
  return ume::to_bf16(value);
}
// Round to nearest even: the spacing of fp16 numbers at `value`, 2^-24 at least, is added and taken
// away as a multiple that leaves no other bits.
template <>
inline std::uint16_t narrow<__half>(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000u : 0u;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7e00u;
  if (size >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00u);
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = size == 0.0f || exponent < -13 ? -24 : exponent - 11;
  const float rounded = std::nearbyint(std::ldexp(size, -unit));  // < 2048, or 2048 itself
  const int mantissa = static_cast<int>(rounded);
  if (unit == -24) return static_cast<std::uint16_t>(sign | mantissa);
  return static_cast<std::uint16_t>(sign | (((unit + 25) << 10) + mantissa - 1024));
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::Block& state = emulator::block();
  const unsigned turn = state.turn;
  if (++state.waiting == static_cast<int>(state.fibers.size())) {
    state.waiting = 0;
    ++state.turn;
    emulator::note_progress();
  } else {
    while (state.turn == turn) emulator::yield();
  }
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::require_all_lanes(mask);
  emulator::exchange(0);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  emulator::require_all_lanes(mask);
  return emulator::from_word<T>(emulator::exchange(emulator::to_word(value))[lane]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, emulator::thread_index() % 32 ^ bits);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulator::require_all_lanes(mask);
  const std::uint64_t* words = emulator::exchange(predicate != 0 ? 1 : 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(words[lane]) << lane;
  return votes;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  emulator::require_all_lanes(mask);
  const std::uint64_t* words = emulator::exchange(value);
  unsigned sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += static_cast<unsigned>(words[lane]);
  return sum;
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  emulator::require_all_lanes(mask);
  const std::uint64_t* words = emulator::exchange(value);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(words[lane]);
  return all;
}

// A fiber is never interrupted, so these are atomic as they stand.
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __float_as_int(float v) { return emulator::from_word<int>(emulator::to_word(v)); }
inline float __int_as_float(int v) { return emulator::from_word<float>(emulator::to_word(v)); }
