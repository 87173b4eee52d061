// The instructions of sm_80 on the host, under the names of ume/cuda/ptx_sm80.cuh. What hardware
// leaves undefined is made to fail here: the destination of an asynchronous copy holds NaN until
// the copying thread has waited for its group.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "block.h"

namespace ume::cuda::sm80 {

namespace ampere {

struct Copy {
  unsigned char* to;
  const void* from;  // nullptr for zeros
};

struct Thread {
  std::vector<Copy> open;                // not yet committed
  std::deque<std::vector<Copy>> groups;  // under way, oldest first
};

inline std::vector<Thread>& threads() {
  static std::vector<Thread> state;
  return state;
}

inline void end_block() {
  for (const Thread& thread : threads()) {
    bool left = !thread.open.empty();
    for (const auto& group : thread.groups) left = left || !group.empty();
    if (left) throw std::runtime_error("a block ended with copies under way");
  }
  threads().clear();
}

inline Thread& thread() {
  static const bool registered = [] {
    emulator::block().at_end.emplace_back(end_block);
    return true;
  }();
  (void)registered;
  const std::size_t at = static_cast<std::size_t>(emulator::thread_index());
  if (threads().size() <= at) threads().resize(at + 1);
  return threads()[at];
}

inline void check_shared(const void* p, std::size_t bytes, std::size_t alignment) {
  const auto offset = static_cast<std::size_t>(static_cast<const unsigned char*>(p) -
                                               emulator::shared_memory());
  if (offset + bytes > emulator::kSharedBytes) emulator::fail("outside of shared memory");
  if (offset % alignment != 0) emulator::fail("misaligned in shared memory");
}

// This lane's copy of a fragment, and everybody's.
inline std::uint16_t half_of(std::uint32_t word, int which) {
  return static_cast<std::uint16_t>(word >> 16 * which);
}

}  // namespace ampere

inline unsigned char* shared_memory() { return emulator::shared_memory(); }

inline void copy_async(void* to, const void* from, bool inside) {
  ampere::check_shared(to, 16, 16);
  if (inside && reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    emulator::fail("copy_async: misaligned source");
  }
  std::memset(to, 0xff, 16);
  ampere::thread().open.push_back({static_cast<unsigned char*>(to), inside ? from : nullptr});
}

inline void copy_commit() {
  ampere::Thread& thread = ampere::thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <int kPending>
void copy_wait() {
  ampere::Thread& thread = ampere::thread();
  while (thread.groups.size() > kPending) {
    for (const ampere::Copy& copy : thread.groups.front()) {
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, 16);
      } else {
        std::memcpy(copy.to, copy.from, 16);
      }
    }
    thread.groups.pop_front();
  }
}

inline void load_matrices(std::uint32_t (&m)[4], const void* row) {
  ampere::check_shared(row, 16, 16);
  const int lane = emulator::thread_index() % 32;
  const std::uint64_t* rows = emulator::exchange(emulator::to_word(row));
  for (int i = 0; i < 4; ++i) {
    const auto* const from = emulator::from_word<const unsigned char*>(rows[i * 8 + lane / 4]);
    std::memcpy(&m[i], from + lane % 4 * 4, 4);
  }
}

template <typename T>
void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b_left,
              std::uint32_t b_right) {
  // Lane l gives its four words of a and two of b: of each only rows l / 4 (+ 8) and columns l / 4.
  std::uint32_t all_a[32][4], all_b[32][2];
  const auto share = [](std::uint32_t low, std::uint32_t high) {
    return emulator::exchange(low | static_cast<std::uint64_t>(high) << 32);
  };
  const auto keep = [&](const std::uint64_t* words, int lane, std::uint32_t* to) {
    to[0] = static_cast<std::uint32_t>(words[lane]);
    to[1] = static_cast<std::uint32_t>(words[lane] >> 32);
  };
  const std::uint64_t* words = share(a[0], a[1]);
  for (int lane = 0; lane < 32; ++lane) keep(words, lane, all_a[lane]);
  words = share(a[2], a[3]);
  for (int lane = 0; lane < 32; ++lane) keep(words, lane, all_a[lane] + 2);
  words = share(b_left, b_right);
  for (int lane = 0; lane < 32; ++lane) keep(words, lane, all_b[lane]);
  const int lane = emulator::thread_index() % 32;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4, column = lane % 4 * 2 + e % 2;
    float sum = d[e];
    for (int k = 0; k < 16; ++k) {
      // Word: left or right half; of a also upper or lower.
      const std::uint32_t a_word = all_a[row * 4 + k % 8 / 2][k / 8 * 2 + e / 2];
      const std::uint32_t b_word = all_b[column * 4 + k % 8 / 2][k / 8];
      sum += emulator::widen<T>(ampere::half_of(a_word, k % 2)) *
             emulator::widen<T>(ampere::half_of(b_word, k % 2));
    }
    d[e] = sum;
  }
}

}  // namespace ume::cuda::sm80
