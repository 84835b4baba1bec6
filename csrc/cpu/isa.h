// isa.h - which instruction-set level runs: the best one that the processor, the operating system and
// LEPTON_MAX_ISA allow, found once at load.
#pragma once

namespace lepton {

// Ordered within an architecture: a level implies every level of it before it, but for avxvnni, which servers with
// AVX-512 may lack. cmake/isa.cmake holds the compiler flags of each.
enum class Isa : int {
  generic,      // plain C++ at the architecture's baseline; correct everywhere
  ssse3,        // x86-64-v2: SSSE3, SSE4.1, SSE4.2, POPCNT
  avx2,         // x86-64-v3: AVX2, FMA, BMI1/2, F16C
  avxvnni,      // the same and AVX-VNNI, 256-bit vpdpbusd (Alder Lake)
  avx512vnni,   // x86-64-v4 (AVX-512 F, BW, CD, DQ, VL) and VNNI
  avx512vbmi2,  // the same and VBMI, VBMI2, BITALG, VPOPCNTDQ (Ice Lake, Zen 4)
  amx,          // the same, BF16 and GFNI, and tile registers: AMX-TILE, AMX-INT8, AMX-BF16 (Sapphire Rapids)
  neondot,      // AArch64 with the dot product (Armv8.2: Cortex-A55 and -A76, Neoverse N1)
  neoni8mm,     // the same and int8 matrix products (FEAT_I8MM: Cortex-A510 and -A710, Neoverse V1 and N2)
};

// This architecture's levels, in order.
#if defined(__x86_64__)
constexpr Isa kIsas[] = {Isa::generic,    Isa::ssse3,       Isa::avx2, Isa::avxvnni,
                         Isa::avx512vnni, Isa::avx512vbmi2, Isa::amx};
#elif defined(__aarch64__)
constexpr Isa kIsas[] = {Isa::generic, Isa::neondot, Isa::neoni8mm};
#else
constexpr Isa kIsas[] = {Isa::generic};
#endif

const char* isa_name(Isa isa);
// False when no level of this architecture has that name.
bool isa_from_name(const char* name, Isa* isa);

// The best level of this processor and operating system.
Isa isa_of_machine();
// The best level up to the one that the environment variable LEPTON_MAX_ISA names; read once.
Isa isa_in_use();
// What LEPTON_MAX_ISA held when it named no level, else nullptr: the bindings raise an error that says so.
const char* isa_unknown_name();

}  // namespace lepton
