#include "ume/cpu_features.h"

#include <stdexcept>

#include "ume/simd.h"

#ifdef UME_X86
#include <cpuid.h>
#endif
#ifdef UME_HAS_AMX_COMPILER
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ume {
namespace {

// Those that best_isa() chooses from.
constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512f, Isa::kAvx512Bf16, Isa::kAmxBf16};

// Linux hands out the 8 KiB of tile state only to processes that ask; once asked, every thread has
// it.
bool tiles_granted() {
#ifdef UME_HAS_AMX_COMPILER
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

Isa detect() {
  Isa best = Isa::kScalar;
  for (Isa isa : kAll)
    if (isa_supported(isa)) best = isa;
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512f: return "avx512f";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmxBf16: return "amx_bf16";
    case Isa::kAmxEmulated: return "amx_emulated";
    default: return "scalar";
  }
}

Isa isa_from_name(const std::string& name) {
  for (Isa isa : kAll)
    if (name == isa_name(isa)) return isa;
  if (name == isa_name(Isa::kAmxEmulated)) return Isa::kAmxEmulated;
  throw std::invalid_argument("unknown instruction set '" + name +
                              "'; known: scalar, avx2, avx512f, avx512_bf16, amx_bf16, "
                              "amx_emulated");
}

bool isa_supported(Isa isa) {
  if (isa == Isa::kScalar) return true;
#ifdef UME_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512f || isa == Isa::kAmxEmulated) return avx512;
#ifdef UME_HAS_AVX512BF16_COMPILER
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::kAvx512Bf16) return bf16;
  if (isa == Isa::kAmxBf16) return bf16 && has_amx_bf16() && tiles_granted();
#endif
#endif
  return false;
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
  for (Isa isa : kAll)
    if (isa_supported(isa)) found.push_back(isa);
  return found;
}

bool has_amx_bf16() {
#ifdef UME_X86
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return (edx >> 22) & 1u;
#endif
  return false;
}

}  // namespace ume
