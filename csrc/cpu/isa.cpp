// isa.cpp - detection of the instruction-set level. The only place in csrc/ that reads the environment.
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace lepton {
namespace {

constexpr const char* kNames[kIsaCount] = {"generic", "ssse3", "avx2", "avx512vnni", "avx512vbmi2", "amx"};

#if defined(__x86_64__)
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
#endif

Isa detect() {
#if defined(__x86_64__)
  // __builtin_cpu_supports looks at CPUID and at XCR0, so a level whose registers the system does not save is not
  // chosen.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("ssse3") || !__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt"))
    return Isa::generic;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2") ||
      !__builtin_cpu_supports("f16c") || !__builtin_cpu_supports("lzcnt"))
    return Isa::ssse3;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512vbmi2") ||
      !__builtin_cpu_supports("avx512bitalg") || !__builtin_cpu_supports("avx512vpopcntdq"))
    return Isa::avx512vnni;
  return has_tiles() ? Isa::amx : Isa::avx512vbmi2;
#else
  return Isa::generic;
#endif
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
  return {std::min(machine, cap), nullptr};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_from_name(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

Isa isa_of_machine() {
  static const Isa machine = detect();
  return machine;
}

Isa isa_in_use() { return choice().isa; }

const char* isa_unknown_name() { return choice().unknown_name; }

}  // namespace lepton
