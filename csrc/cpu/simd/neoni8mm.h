// neoni8mm.h - the vector operations of neon.h with products by smmla: of two rows, two columns and eight k. A last odd
// row is multiplied by sdot; of one row smmla does no more.
#pragma once

#include "cpu/simd/neon.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kInt8Rows = 6, kInt8Panels = 1;  // 24 sums + 3 pairs of rows + 4 weights of 32 registers
constexpr int kInt4Rows = 6, kInt4Panels = 1;  // the same + the mask

LEPTON_INLINE void store_s8(uint8_t* p, const I32x16 (&x)[4]) { store_64<1>(p, x, true); }

// As asm, for gcc moves sums from register to register around the intrinsic, and some to the stack.
LEPTON_INLINE void add_products(int32x4_t& acc, int8x16_t a, int8x16_t w) {
  asm("smmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(w));
}

// Adds the products of eight k and the columns 4 j to 4 j + 3, whose k 0 to 3 are `first`, 4 to 7 `second`. Sums of
// rows 2 i and 2 i + 1 are blocks of 2 x 2: part j of acc[2 i] is that of the first two of the columns, of acc[2 i + 1]
// that of the others.
template <int j, int rows>
LEPTON_INLINE void dot_columns(I32x16 (&acc)[rows], const int8x16_t (&a)[(rows + 1) / 2], int8x16_t first,
                               int8x16_t second) {
  if constexpr (rows > 1) {
    const int32x4_t quads[2] = {vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second)};
    const int8x16_t left = vreinterpretq_s8_s32(vzip1q_s32(quads[0], quads[1]));
    const int8x16_t right = vreinterpretq_s8_s32(vzip2q_s32(quads[0], quads[1]));
    unroll<rows / 2>([&]<int i>() LEPTON_LAMBDA_INLINE {
      add_products(acc[2 * i].part[j], a[i], left);
      add_products(acc[2 * i + 1].part[j], a[i], right);
    });
  }
  if constexpr (rows % 2) {
    int32x4_t& sums = acc[rows - 1].part[j];
    sums = vdotq_laneq_s32(sums, first, a[rows / 2], 0);
    sums = vdotq_laneq_s32(sums, second, a[rows / 2], 1);
  }
}

// What is read below is not read above: gcc reads the weights of a whole step first, and spills sums for them.
template <int rows>
LEPTON_INLINE void hold_loads() {
  if constexpr (rows > 1) asm volatile("" ::: "memory");
}

// Eight k of all rows, as they lie in RowLayout::pairs.
template <int rows>
LEPTON_INLINE void load_pairs(int8x16_t (&pairs)[(rows + 1) / 2], const uint8_t* a, int64_t lda) {
  unroll<(rows + 1) / 2>([&]<int i>()
                             LEPTON_LAMBDA_INLINE { pairs[i] = vreinterpretq_s8_u8(vld1q_u8(a + 2 * i * lda)); });
}

template <int rows>
LEPTON_INLINE void dot_s8(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const int8_t* w) {
  int8x16_t pairs[(rows + 1) / 2];
  load_pairs<rows>(pairs, a, lda);
  unroll<4>([&]<int j>() LEPTON_LAMBDA_INLINE {
    dot_columns<j, rows>(acc, pairs, vld1q_s8(w + 16 * j), vld1q_s8(w + 64 + 16 * j));
    if constexpr (j == 1) hold_loads<rows>();
  });
}

template <int rows>
LEPTON_INLINE void dot_u4(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  unroll<2>([&]<int half>() LEPTON_LAMBDA_INLINE {
    int8x16_t pairs[(rows + 1) / 2];
    load_pairs<rows>(pairs, a + 16 * half, lda);
    unroll<4>([&]<int j>() LEPTON_LAMBDA_INLINE {
      const uint8x16_t nibbles = vld1q_u8(w + 64 * half + 16 * j);
      dot_columns<j, rows>(acc, pairs, vreinterpretq_s8_u8(vandq_u8(nibbles, vdupq_n_u8(0xf))),
                           vreinterpretq_s8_u8(vshrq_n_u8(nibbles, 4)));
      hold_loads<rows>();
    });
  });
}

template <int rows>
LEPTON_INLINE void sums_to_rows(I32x16 (&acc)[rows]) {
  unroll<rows / 2 * 4>([&]<int n>() LEPTON_LAMBDA_INLINE {
    int32x4_t& upper = acc[n / 4 * 2].part[n % 4];
    int32x4_t& lower = acc[n / 4 * 2 + 1].part[n % 4];
    const int64x2_t left = vreinterpretq_s64_s32(upper), right = vreinterpretq_s64_s32(lower);
    upper = vreinterpretq_s32_s64(vzip1q_s64(left, right));
    lower = vreinterpretq_s32_s64(vzip2q_s64(left, right));
  });
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
