// What every kernel here takes from CUDA beside its own instructions (ptx_*.cuh). With UME_EMULATE
// the same code compiles for the host: tests/emulator/block.h supplies threads, shuffles and shared
// memory.
#pragma once

#include <cstdint>

#ifdef UME_EMULATE
#include <cmath>

#include "block.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "ume/element.h"

namespace ume::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// 2^x to two units in the last place, one instruction; 2^-inf is 0 and NaN stays NaN.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef UME_EMULATE
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Makes the compiler load again what it loaded before. An unrolled loop over rows would otherwise
// keep all columns' conditions in registers, and there are none to spare beside the accumulators.
__device__ __forceinline__ void forget_loads() {
#ifndef UME_EMULATE
  __syncwarp();
#endif
}

// Two numbers as neighbouring 16-bit elements, `low` at the lower address.
template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);

#ifdef UME_EMULATE
template <>
inline std::uint32_t pack<__nv_bfloat16>(float low, float high) {
  return emulator::narrow<__nv_bfloat16>(low) |
         static_cast<std::uint32_t>(emulator::narrow<__nv_bfloat16>(high)) << 16;
}
template <>
inline std::uint32_t pack<__half>(float low, float high) {
  return emulator::narrow<__half>(low) |
         static_cast<std::uint32_t>(emulator::narrow<__half>(high)) << 16;
}
#else
template <>
__device__ __forceinline__ std::uint32_t pack<__nv_bfloat16>(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
__device__ __forceinline__ std::uint32_t pack<__half>(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif

}  // namespace ume::cuda
