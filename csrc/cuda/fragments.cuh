// fragments.cuh - the tensor core's operands: mma.sync on 16 outputs x 8 rows of X, and integers made into bf16 and
// fp16 pairs by bit operations, without a conversion instruction.
//
// Lane 4g + t of a warp holds rows g and g + 8 of A (W, 16 x k), row g of B (X, 8 x k) and, of the product, columns 2t
// and 2t + 1 of rows g and g + 8. Which k a register stands for does not matter as long as A and B agree.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace lepton::cuda {

// (a & mask) | bits, in one instruction.
template <uint32_t mask, uint32_t bits>
__host__ __device__ inline uint32_t masked_or(uint32_t a) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "n"(mask), "n"(bits));
  return out;
#else
  return (a & mask) | bits;
#endif
}

// The two 16-bit floats of an activation type T, as the formats use them.
template <class T>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  static constexpr uint32_t kOnes = 0x3f803f80;
  // 128 + u from nibble u: bf16 has 7 bits of mantissa, so at exponent 7 the last one stands for 1.
  static constexpr int kNibbleBias = 128;
  // Nibbles i and i + 4 of a word.
  template <int i>
  __host__ __device__ static uint32_t nibbles(uint32_t word) {
    return masked_or<0x000f000f, 0x43004300>(word >> (4 * i));
  }
  // Bytes i and i + 2 of a word of int8, exactly: b = (b & 127) - 128 * sign, and both 128 + (b & 127) and
  // -128 - 128 * sign are bf16 numbers. (sm_80 adds bf16 by fma alone.)
  template <int i>
  __device__ static uint32_t bytes(uint32_t word) {
    const uint32_t w = word >> (8 * i);
    const uint32_t low = masked_or<0x007f007f, 0x43004300>(w), sign = masked_or<0x00800080, 0xc300c300>(w);
    uint32_t out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(kOnes), "r"(sign));
    return out;
  }
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  __device__ static __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
};

template <>
struct Pair<__half> {
  static constexpr uint32_t kOnes = 0x3c003c00;
  // 64 + u: of fp16's 10 bits of mantissa the nibble takes bits 4 to 7, which at exponent 6 stand for 1 to 8.
  static constexpr int kNibbleBias = 64;
  template <int i>
  __host__ __device__ static uint32_t nibbles(uint32_t word) {
    return masked_or<0x00f000f0, 0x54005400>(i == 0 ? word << 4 : word >> (4 * (i - (i != 0))));
  }
  // 1024 + (b ^ 128) - 1152 = b.
  template <int i>
  __device__ static uint32_t bytes(uint32_t word) {
    const uint32_t biased = masked_or<0x00ff00ff, 0x64006400>((word ^ 0x80808080) >> (8 * i));
    uint32_t out;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(biased), "r"(0x64806480));
    return out;
  }
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  __device__ static __half from(float x) { return __float2half_rn(x); }
};

__device__ inline void mma_int8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace lepton::cuda
