// unroll.h - loops over registers.
#pragma once

#include "cpu/kernel_table.h"

#define LEPTON_LAMBDA_INLINE __attribute__((always_inline))

namespace lepton::LEPTON_ISA {
namespace {

// body.operator()<0>(), ..., <count - 1>(): a loop that is unrolled before the compiler looks at it. An array of sums
// indexed by a loop's variable stays in memory (gcc unrolls too late to know better), one indexed by constants does
// not.
template <int count, int i = 0, typename Body>
LEPTON_INLINE void unroll(const Body& body) {
  if constexpr (i < count) {
    body.template operator()<i>();
    unroll<count, i + 1>(body);
  }
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
