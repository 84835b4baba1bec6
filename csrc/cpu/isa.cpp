// isa.cpp - detection of the instruction-set level. The only place in csrc/ that reads the environment.
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <cstring>
#include <iterator>

namespace lepton {
namespace {

constexpr const char* kNames[] = {"generic",     "ssse3", "avx2",    "avxvnni", "avx512vnni",
                                  "avx512vbmi2", "amx",   "neondot", "neoni8mm"};

#if defined(__x86_64__)
// Both by their bits: clang 14's __builtin_cpu_supports does not know their names.
bool has_f16c_and_lzcnt() {
  constexpr unsigned kF16c = 1u << 29, kLzcnt = 1u << 5;  // CPUID 1, ECX; CPUID 0x80000001, ECX
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kF16c)) return false;
  return __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & kLzcnt);
}

bool has_avx_vnni() {
  constexpr unsigned kAvxVnni = 1u << 4;  // CPUID 7.1, EAX
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni);
}

// Tile registers: the processor has them, the system saves them, and it grants them to this process (to threads that
// exist and to those that come).
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;  // CPUID 7.0, EDX
  constexpr unsigned kAvx512Bf16 = 1u << 5;                                          // CPUID 7.1, EAX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;                        // arch_prctl(2), XCR0 bit
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (~d & (kAmxBf16 | kAmxTile | kAmxInt8)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// __builtin_cpu_supports looks at CPUID and at XCR0, so a level whose registers the system does not save is not chosen.
#if !defined(LEPTON_HAS)  // make avx512-check: all of them
#define LEPTON_HAS __builtin_cpu_supports
#endif
bool has(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::ssse3:
      return LEPTON_HAS("ssse3") && LEPTON_HAS("sse4.2") && LEPTON_HAS("popcnt");
    case Isa::avx2:
      return has(Isa::ssse3) && LEPTON_HAS("avx2") && LEPTON_HAS("fma") && LEPTON_HAS("bmi2") && has_f16c_and_lzcnt();
    case Isa::avxvnni:
      return has(Isa::avx2) && has_avx_vnni();
    case Isa::avx512vnni:
      return has(Isa::avx2) && LEPTON_HAS("avx512f") && LEPTON_HAS("avx512bw") && LEPTON_HAS("avx512cd") &&
             LEPTON_HAS("avx512dq") && LEPTON_HAS("avx512vl") && LEPTON_HAS("avx512vnni");
    case Isa::avx512vbmi2:
      return has(Isa::avx512vnni) && LEPTON_HAS("avx512vbmi") && LEPTON_HAS("avx512vbmi2") &&
             LEPTON_HAS("avx512bitalg") && LEPTON_HAS("avx512vpopcntdq");
    case Isa::amx:
      return has(Isa::avx512vbmi2) && LEPTON_HAS("gfni") && has_tiles();
    case Isa::neondot:
    case Isa::neoni8mm:
      return false;
  }
  return false;
}
#undef LEPTON_HAS
#elif defined(__aarch64__) && defined(__linux__)
bool has(Isa isa) {
  constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM, which older headers do not name
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::neondot:
      return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
    case Isa::neoni8mm:
      return has(Isa::neondot) && (getauxval(AT_HWCAP2) & kI8mm);
    default:
      return false;
  }
}
#else
bool has(Isa isa) { return isa == Isa::generic; }
#endif

Isa best_up_to(Isa cap) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  Isa best = Isa::generic;
  for (const Isa isa : kIsas)
    if (isa <= cap && has(isa)) best = isa;
  return best;
}

struct Choice {
  Isa isa;
  const char* unknown_name;
};

Choice choose() {
  const Isa machine = isa_of_machine();
  const char* name = std::getenv("LEPTON_MAX_ISA");
  if (name == nullptr || *name == '\0') return {machine, nullptr};
  Isa cap;
  if (!isa_from_name(name, &cap)) return {machine, name};
  return {best_up_to(cap), nullptr};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_from_name(const char* name, Isa* isa) {
  for (const Isa level : kIsas) {
    if (std::strcmp(name, isa_name(level)) == 0) {
      *isa = level;
      return true;
    }
  }
  return false;
}

Isa isa_of_machine() {
  static const Isa machine = best_up_to(kIsas[std::size(kIsas) - 1]);
  return machine;
}

Isa isa_in_use() { return choice().isa; }

const char* isa_unknown_name() { return choice().unknown_name; }

}  // namespace lepton
