// kernel_table.h - one function compiled once per instruction-set level, and the choice between the copies.
//
// A kernel lives in NAME.kernel.cpp inside `namespace lepton::LEPTON_ISA`, which cmake/isa.cmake compiles for every
// level. Its header declares the table:
//
//   using GemmFn = void(const GemmArgs&);
//   LEPTON_KERNEL(gemm, GemmFn)          // declares lepton::avx2::gemm, ... and lepton::select_gemm(isa)
//
// A .kernel.cpp and what it includes use no std header: an inline std function compiled there with AVX-512 would be a
// weak symbol that the linker may hand to baseline code. tests/kernels/test_isa.py looks for weak symbols.
#pragma once

#include "cpu/isa.h"

#define LEPTON_INLINE inline __attribute__((always_inline))

// Each(isa, name, Function) for every level that a kernel is compiled for: LEPTON_ISAS in cmake/isa.cmake.
#if defined(__x86_64__)
#define LEPTON_LEVELS_TO_AVX2(Each, name, Function) \
  Each(generic, name, Function) Each(ssse3, name, Function) Each(avx2, name, Function)
#define LEPTON_LEVELS(Each, name, Function)                                                        \
  LEPTON_LEVELS_TO_AVX2(Each, name, Function)                                                      \
  Each(avxvnni, name, Function) Each(avx512vnni, name, Function) Each(avx512vbmi2, name, Function) \
      Each(amx, name, Function)
#else
#define LEPTON_LEVELS_TO_AVX2(Each, name, Function) Each(generic, name, Function)
#if defined(__aarch64__)
#define LEPTON_LEVELS(Each, name, Function) \
  Each(generic, name, Function) Each(neondot, name, Function) Each(neoni8mm, name, Function)
#else
#define LEPTON_LEVELS(Each, name, Function) Each(generic, name, Function)
#endif
#endif

#define LEPTON_DECLARE(isa, name, Function) \
  namespace isa {                           \
  Function name;                            \
  }
#define LEPTON_RETURN_CASE(level, name, Function) \
  case Isa::level:                                \
    return level::name;
// clang-format off
#define LEPTON_KERNEL_OF(Levels, name, Function)   \
  Levels(LEPTON_DECLARE, name, Function)           \
  static inline Function* select_##name(Isa isa) { \
    switch (isa) {                                 \
      Levels(LEPTON_RETURN_CASE, name, Function)   \
      default:                                     \
        return generic::name;                      \
    }                                              \
  }
// clang-format on

#define LEPTON_KERNEL(name, Function) LEPTON_KERNEL_OF(LEPTON_LEVELS, name, Function)
// For a kernel that levels with fast products of bytes do without (splits_activations in quantize_rows.h).
#define LEPTON_KERNEL_TO_AVX2(name, Function) LEPTON_KERNEL_OF(LEPTON_LEVELS_TO_AVX2, name, Function)
