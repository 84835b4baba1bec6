// avxvnni.h - the vector operations of avx2.h with products by vpdpbusd, which is exact.
#pragma once

#include "cpu/simd/avx2.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kQuadBytes = 4;                  // vpdpbusd takes the four bytes as they are
constexpr int kInt8Rows = 6, kInt8Panels = 1;  // 12 sums + 2 weights + 1 activation of 16 registers
constexpr int kInt4Rows = 6, kInt4Panels = 1;  // 12 sums + 2 weights + 1 + the mask
constexpr int kSplitSums = 0;

LEPTON_INLINE void store_quads(uint8_t* p, I32x16 v) { store_u8(p, v); }

// acc += a u8 . w s8, four bytes a lane. As asm, for gcc stores all sums of dot_u4's loop to the stack in every
// iteration.
LEPTON_INLINE void add_products(__m256i& acc, __m256i a, __m256i w) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(w));
}

template <int rows>
LEPTON_INLINE void dot_s8(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const int8_t* w) {
  const __m256i* const quads = reinterpret_cast<const __m256i*>(w);
  const __m256i first = _mm256_loadu_si256(quads), second = _mm256_loadu_si256(quads + 1);
  unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
    const __m256i activation = broadcast_quad(a + r * lda);
    add_products(acc[r].half[0], activation, first);
    add_products(acc[r].half[1], activation, second);
  });
}

template <int rows>
LEPTON_INLINE void dot_u4(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  const __m256i low = _mm256_set1_epi8(0xf);
  unroll<4>([&]<int q>() LEPTON_LAMBDA_INLINE {
    __m256i quad[2];
    unroll<2>([&]<int h>() LEPTON_LAMBDA_INLINE {
      const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + q / 2 * 2 + h);
      quad[h] = _mm256_and_si256(q % 2 ? _mm256_srli_epi16(pair, 4) : pair, low);
    });
    unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
      const __m256i activation = broadcast_quad(a + r * lda + 4 * q);
      add_products(acc[r].half[0], quad[0], activation);
      add_products(acc[r].half[1], quad[1], activation);
    });
  });
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
