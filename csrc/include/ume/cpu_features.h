// What the processor offers, asked once at run time. No torch, no pybind11.
#pragma once

#include <string>
#include <vector>

namespace ume {

// Instruction sets the CPU kernels have a path for, slowest first. A kernel without a path for
// kAmxBf16 takes that of kAvx512Bf16, which such a processor has too. kAmxEmulated is the code of
// kAmxBf16 with the tile instructions replaced by loops: it can be asked for by name, to test that
// code where there are no tiles, and is never offered.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512f = 2, kAvx512Bf16 = 3, kAmxBf16 = 4,
                 kAmxEmulated = 5 };

const char* isa_name(Isa isa);

// Throws std::invalid_argument for a name that is not one of isa_name's.
Isa isa_from_name(const std::string& name);

// True when the processor, the operating system and the compiler of this build all know `isa`.
bool isa_supported(Isa isa);

// Fastest supported instruction set; cached after the first call.
Isa best_isa();

// Every supported instruction set, slowest first.
std::vector<Isa> supported_isas();

// True when the processor has bf16 matrix tiles (AMX-BF16), whether or not kAmxBf16 is supported:
// the dispatcher asks because oneDNN uses them.
bool has_amx_bf16();

}  // namespace ume
