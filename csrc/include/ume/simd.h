// Which x86 vector paths this compiler can build. The file is compiled for the baseline
// instruction set; functions opt in to more with a target attribute and are only called after
// isa_supported() said yes.
#pragma once

#if (defined(__x86_64__) || defined(__amd64__)) && (defined(__GNUC__) || defined(__clang__))
#define UME_X86 1
#if defined(__clang__) || __GNUC__ >= 10
#define UME_HAS_AVX512BF16_COMPILER 1
#endif
// Tiles need an assembler that knows them and an operating system that grants them.
#if defined(__linux__) && defined(__x86_64__) && !defined(__ILP32__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define UME_HAS_AMX_COMPILER 1
#endif
#endif

#define UME_INLINE inline __attribute__((always_inline))
