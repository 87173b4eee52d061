// The instructions of sm_90a that the Hopper main loop is made of, one function each: barriers in
// shared memory, the tensor memory accelerator, warp-group products, register budgets.
//
// Facts are those of the PTX ISA (mbarrier, cp.async.bulk.tensor, wgmma, setmaxnreg). With
// UME_EMULATE the same names come from tests/emulator/hopper.h and run on the host.
#pragma once

#include <cstdint>

#ifdef UME_EMULATE
#include "hopper.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Device code of this file exists in passes for sm_90a only; in any other pass a kernel that uses
// it must be empty.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define UME_SM90A 1
#endif

namespace ume::cuda::sm90 {

// One phase of a barrier completes when the announced arrivals and the announced bytes are there.
using Barrier = std::uint64_t;

// The block's dynamic shared memory. Kernels here have no other, so it starts 1024-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the copy engine; the block must synchronise after it.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives and announces bytes that copies will bring within this phase.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has completed. A fresh barrier is in phase 0, so waiting
// for parity 1 returns at once. try_wait sleeps in hardware for a while before it says no.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni through;\n"
      "bra.uni again;\n"
      "through:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A barrier of `threads` threads (a multiple of 32) of the block; id 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Cache policy for data that every block reads again and again.
__device__ __forceinline__ std::uint64_t keep_in_l2() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Cache policy for data that streams by.
__device__ __forceinline__ std::uint64_t stream_through_l2() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies the box whose first element is (x = column, y = row) to dst, 1024-byte aligned; its bytes,
// those of the zeros beyond the matrix included, count towards the barrier. One thread calls it.
__device__ __forceinline__ void copy_box(void* dst, const CUtensorMap* map, Barrier* barrier,
                                         int x, int y, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "l"(policy)
      : "memory");
}

// Raises or lowers the registers per thread; all warps of a warp group together.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Orders earlier accesses of accumulator registers before the products that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending of the committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of the accumulators across this point: it does not know
// that products write them later.
template <int kBlocks>
__device__ __forceinline__ void pin_registers(float (&d)[kBlocks][4]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
  }
}

// d[n][e] += (or =, if !accumulate) the 64 x kN product of two tiles, 16 elements deep. Of warp w
// of the warp group, lane l: rows 16 w + l/4 (e = 0, 1) and + 8 (e = 2, 3), columns
// 8 n + 2 (l % 4) + e % 2: the layout of mma.sync m16n8 accumulators. `a` and `b` are descriptors.
template <typename T>
struct Wgmma;

#define UME_REGS_8(n) \
  "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), "+f"(d[n + 1][0]), \
      "+f"(d[n + 1][1]), "+f"(d[n + 1][2]), "+f"(d[n + 1][3])
#define UME_REGS_32(n) UME_REGS_8(n), UME_REGS_8(n + 2), UME_REGS_8(n + 4), UME_REGS_8(n + 6)
#define UME_NAMES_64 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45," \
  "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define UME_NAMES_128 \
  UME_NAMES_64 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85," \
  "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106," \
  "%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124," \
  "%125,%126,%127"

// Both operands K-major (no transpose) and not negated.
#define UME_WGMMA(type, name)                                                                      \
  template <>                                                                                      \
  struct Wgmma<type> {                                                                             \
    static __device__ __forceinline__ void multiply(float (&d)[32][4], std::uint64_t a,            \
                                                    std::uint64_t b, bool accumulate) {            \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                            \
          "wgmma.mma_async.sync.aligned.m64n256k16.f32." name "." name " {" UME_NAMES_128          \
          "}, %128, %129, p, 1, 1, 0, 0;\n}\n"                                                     \
          : UME_REGS_32(0), UME_REGS_32(8), UME_REGS_32(16), UME_REGS_32(24)                       \
          : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                    \
    }                                                                                              \
    static __device__ __forceinline__ void multiply(float (&d)[16][4], std::uint64_t a,            \
                                                    std::uint64_t b, bool accumulate) {            \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                             \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" UME_NAMES_64           \
          "}, %64, %65, p, 1, 1, 0, 0;\n}\n"                                                       \
          : UME_REGS_32(0), UME_REGS_32(8)                                                         \
          : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                    \
    }                                                                                              \
  };
UME_WGMMA(__nv_bfloat16, "bf16")
UME_WGMMA(__half, "f16")
#undef UME_WGMMA
#undef UME_NAMES_128
#undef UME_NAMES_64
#undef UME_REGS_32
#undef UME_REGS_8

}  // namespace ume::cuda::sm90

#endif  // UME_EMULATE

namespace ume::cuda::sm90 {

// Descriptor of a tile that copy_box wrote: rows of 128 bytes (64 elements deep), 128-byte swizzle.
//   bits  0-13  start address / 16
//   bits 16-29  leading offset, without meaning for a swizzled K-major tile
//   bits 32-45  bytes between groups of 8 rows / 16 = 1024 / 16
//   bits 62-63  1 = 128-byte swizzle
// The swizzle exchanges address bits 4-6 with bits 4-6 ^ bits 7-9 after the address was formed, so
// a step of 16 elements along the depth adds 32 bytes to the start address.
#ifdef UME_EMULATE
inline
#else
__device__ __forceinline__
#endif
    std::uint64_t tile_descriptor(const void* tile) {
  return static_cast<std::uint64_t>((shared_address(tile) & 0x3ffffu) >> 4) |
         (static_cast<std::uint64_t>(1) << 16) | (static_cast<std::uint64_t>(1024 >> 4) << 32) |
         (static_cast<std::uint64_t>(1) << 62);
}
constexpr std::uint64_t kDescriptorStep = 32 >> 4;  // 16 elements further along the depth

}  // namespace ume::cuda::sm90
