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

#if defined(__x86_64__)
#define LEPTON_KERNEL(name, Function)              \
  namespace generic {                              \
  Function name;                                   \
  }                                                \
  namespace ssse3 {                                \
  Function name;                                   \
  }                                                \
  namespace avx2 {                                 \
  Function name;                                   \
  }                                                \
  namespace avx512vnni {                           \
  Function name;                                   \
  }                                                \
  namespace avx512vbmi2 {                          \
  Function name;                                   \
  }                                                \
  namespace amx {                                  \
  Function name;                                   \
  }                                                \
  static inline Function* select_##name(Isa isa) { \
    switch (isa) {                                 \
      case Isa::generic:                           \
        return generic::name;                      \
      case Isa::ssse3:                             \
        return ssse3::name;                        \
      case Isa::avx2:                              \
        return avx2::name;                         \
      case Isa::avx512vnni:                        \
        return avx512vnni::name;                   \
      case Isa::avx512vbmi2:                       \
        return avx512vbmi2::name;                  \
      case Isa::amx:                               \
        return amx::name;                          \
    }                                              \
    return generic::name;                          \
  }
// For a kernel that levels from AVX-512 on do without; compiled up to avx2.
#define LEPTON_KERNEL_TO_AVX2(name, Function)                                             \
  namespace generic {                                                                     \
  Function name;                                                                          \
  }                                                                                       \
  namespace ssse3 {                                                                       \
  Function name;                                                                          \
  }                                                                                       \
  namespace avx2 {                                                                        \
  Function name;                                                                          \
  }                                                                                       \
  static inline Function* select_##name(Isa isa) {                                        \
    return isa == Isa::generic ? generic::name : isa == Isa::ssse3 ? ssse3::name : avx2::name; \
  }
#else
#define LEPTON_KERNEL_TO_AVX2(name, Function) LEPTON_KERNEL(name, Function)
#define LEPTON_KERNEL(name, Function) \
  namespace generic {                 \
  Function name;                      \
  }                                   \
  static inline Function* select_##name(Isa) { return generic::name; }
#endif
