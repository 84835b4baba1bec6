// neon.h - the vector operations in four 128-bit registers of AArch64, with the dot product (sdot).
#pragma once

#include <arm_neon.h>

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kQuadBytes = 4;  // four bytes, less 128 (signed_quads in quantize_rows.h): sdot is signed
constexpr int kSplitSums = 0;
constexpr int kDirectSums = 4;  // 16 of 32 registers

struct F32x16 {
  float32x4_t part[4];
};
struct I32x16 {
  int32x4_t part[4];
};

#define LEPTON_PARTS(V, expression)                     \
  V out;                                                \
  for (int i = 0; i < 4; ++i) out.part[i] = expression; \
  return out

template <Dtype dtype>
LEPTON_INLINE F32x16 load_f32(const void* p) {
  if constexpr (dtype == Dtype::f32) {
    LEPTON_PARTS(F32x16, vld1q_f32(static_cast<const float*>(p) + 4 * i));
  } else {
    const uint16_t* const half = static_cast<const uint16_t*>(p);
    if constexpr (dtype == Dtype::bf16) {
      LEPTON_PARTS(F32x16, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(half + 4 * i), 16)));
    } else {
      LEPTON_PARTS(F32x16, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + 4 * i))));
    }
  }
}

LEPTON_INLINE uint16x4_t bf16_from_f32(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000)), 16);
}

template <Dtype dtype>
LEPTON_INLINE void store_f32(void* p, F32x16 v) {
  for (int i = 0; i < 4; ++i) {
    if constexpr (dtype == Dtype::f32) {
      vst1q_f32(static_cast<float*>(p) + 4 * i, v.part[i]);
    } else {
      uint16_t* const half = static_cast<uint16_t*>(p) + 4 * i;
      if constexpr (dtype == Dtype::bf16)
        vst1_u16(half, bf16_from_f32(v.part[i]));
      else
        vst1_u16(half, vreinterpret_u16_f16(vcvt_f16_f32(v.part[i])));
    }
  }
}

LEPTON_INLINE F32x16 broadcast_f32(float x) { LEPTON_PARTS(F32x16, vdupq_n_f32(x)); }
LEPTON_INLINE F32x16 add(F32x16 a, F32x16 b) { LEPTON_PARTS(F32x16, vaddq_f32(a.part[i], b.part[i])); }
LEPTON_INLINE F32x16 sub(F32x16 a, F32x16 b) { LEPTON_PARTS(F32x16, vsubq_f32(a.part[i], b.part[i])); }
LEPTON_INLINE F32x16 mul(F32x16 a, F32x16 b) { LEPTON_PARTS(F32x16, vmulq_f32(a.part[i], b.part[i])); }
LEPTON_INLINE F32x16 div(F32x16 a, F32x16 b) { LEPTON_PARTS(F32x16, vdivq_f32(a.part[i], b.part[i])); }
// Of a NaN, or of zeros, the second operand as on x86; vminq_f32 would give the NaN, or the zero by its sign.
LEPTON_INLINE F32x16 min(F32x16 a, F32x16 b) {
  LEPTON_PARTS(F32x16, vbslq_f32(vcltq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]));
}
LEPTON_INLINE F32x16 max(F32x16 a, F32x16 b) {
  LEPTON_PARTS(F32x16, vbslq_f32(vcgtq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]));
}
LEPTON_INLINE F32x16 fmadd(F32x16 a, F32x16 b, F32x16 c) {
  LEPTON_PARTS(F32x16, vfmaq_f32(c.part[i], a.part[i], b.part[i]));
}
LEPTON_INLINE I32x16 round_i32(F32x16 v) { LEPTON_PARTS(I32x16, vcvtnq_s32_f32(v.part[i])); }
LEPTON_INLINE F32x16 to_f32(I32x16 v) { LEPTON_PARTS(F32x16, vcvtq_f32_s32(v.part[i])); }

LEPTON_INLINE I32x16 as_i32(F32x16 v) { LEPTON_PARTS(I32x16, vreinterpretq_s32_f32(v.part[i])); }
LEPTON_INLINE F32x16 as_f32(I32x16 v) { LEPTON_PARTS(F32x16, vreinterpretq_f32_s32(v.part[i])); }

LEPTON_INLINE I32x16 broadcast_i32(int32_t x) { LEPTON_PARTS(I32x16, vdupq_n_s32(x)); }
LEPTON_INLINE I32x16 load_i32(const void* p) {
  LEPTON_PARTS(I32x16, vld1q_s32(static_cast<const int32_t*>(p) + 4 * i));
}
LEPTON_INLINE I32x16 load_u8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t words[2] = {vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)};
  LEPTON_PARTS(I32x16,
               vreinterpretq_s32_u32(i % 2 ? vmovl_high_u16(words[i / 2]) : vmovl_u16(vget_low_u16(words[i / 2]))));
}
LEPTON_INLINE I32x16 load_s8(const uint8_t* p) {
  const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
  const int16x8_t words[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)};
  LEPTON_PARTS(I32x16, i % 2 ? vmovl_high_s16(words[i / 2]) : vmovl_s16(vget_low_s16(words[i / 2])));
}
LEPTON_INLINE void store_i32(void* p, I32x16 x) {
  for (int i = 0; i < 4; ++i) vst1q_s32(static_cast<int32_t*>(p) + 4 * i, x.part[i]);
}
LEPTON_INLINE I32x16 add(I32x16 a, I32x16 b) { LEPTON_PARTS(I32x16, vaddq_s32(a.part[i], b.part[i])); }
LEPTON_INLINE I32x16 sub(I32x16 a, I32x16 b) { LEPTON_PARTS(I32x16, vsubq_s32(a.part[i], b.part[i])); }
LEPTON_INLINE I32x16 mul(I32x16 a, I32x16 b) { LEPTON_PARTS(I32x16, vmulq_s32(a.part[i], b.part[i])); }
LEPTON_INLINE I32x16 min(I32x16 a, I32x16 b) { LEPTON_PARTS(I32x16, vminq_s32(a.part[i], b.part[i])); }
LEPTON_INLINE I32x16 max(I32x16 a, I32x16 b) { LEPTON_PARTS(I32x16, vmaxq_s32(a.part[i], b.part[i])); }
LEPTON_INLINE I32x16 bit_and(I32x16 a, I32x16 b) { LEPTON_PARTS(I32x16, vandq_s32(a.part[i], b.part[i])); }
LEPTON_INLINE I32x16 bit_xor(I32x16 a, I32x16 b) { LEPTON_PARTS(I32x16, veorq_s32(a.part[i], b.part[i])); }
template <int n>
LEPTON_INLINE I32x16 shift_left(I32x16 a) {
  LEPTON_PARTS(I32x16, a.part[i] << n);
}
template <int n>
LEPTON_INLINE I32x16 shift_right(I32x16 a) {
  LEPTON_PARTS(I32x16, vreinterpretq_s32_u32(vreinterpretq_u32_s32(a.part[i]) >> n));
}
template <int n>
LEPTON_INLINE I32x16 shift_right_signed(I32x16 a) {
  LEPTON_PARTS(I32x16, a.part[i] >> n);
}
#undef LEPTON_PARTS

// Sixteen bytes of a row; in RowLayout::pairs eight bytes of the other row follow each eight of them.
template <int together = kTogether>
LEPTON_INLINE void store_bytes(uint8_t* p, uint8x16_t bytes) {
  if constexpr (together == 1) return vst1q_u8(p, bytes);
  vst1_u8(p, vget_low_u8(bytes));
  vst1_u8(p + 16, vget_high_u8(bytes));
}
LEPTON_INLINE void store_u8(uint8_t* p, I32x16 v) {
  const int16x8_t words[2] = {vmovn_high_s32(vmovn_s32(v.part[0]), v.part[1]),
                              vmovn_high_s32(vmovn_s32(v.part[2]), v.part[3])};
  store_bytes(p, vreinterpretq_u8_s8(vmovn_high_s16(vmovn_s16(words[0]), words[1])));
}
template <int together = kTogether>
LEPTON_INLINE void store_64(uint8_t* p, const I32x16 (&x)[4], bool biased) {
  const int8x16_t flip = vdupq_n_s8(biased ? 0 : -128);
  for (int i = 0; i < 4; ++i) {
    const int16x8_t words[2] = {vqmovn_high_s32(vqmovn_s32(x[i].part[0]), x[i].part[1]),
                                vqmovn_high_s32(vqmovn_s32(x[i].part[2]), x[i].part[3])};
    const int8x16_t bytes = vqmovn_high_s16(vqmovn_s16(words[0]), words[1]);
    store_bytes<together>(p + 16 * together * i, vreinterpretq_u8_s8(veorq_s8(bytes, flip)));
  }
}
LEPTON_INLINE void store_quads(uint8_t* p, I32x16 v) { store_u8(p, v); }

LEPTON_INLINE void store_turned(int16_t* p, const I32x16 (&rows)[1]) {
  for (int i = 0; i < 2; ++i)
    vst1q_s16(p + 8 * i, vmovn_high_s32(vmovn_s32(rows[0].part[2 * i]), rows[0].part[2 * i + 1]));
}

// smlal widens by itself: nothing is interleaved.
template <int vectors>
LEPTON_INLINE void dot_pair(I32x16 (&acc)[vectors], const void* x0, const void* x1, const uint8_t* w) {
  int16_t weight[2];
  __builtin_memcpy(weight, w, 4);
  unroll<2 * vectors>([&]<int i>() LEPTON_LAMBDA_INLINE {  // eight rows
    const int16x8_t first = vld1q_s16(static_cast<const int16_t*>(x0) + 8 * i);
    const int16x8_t second = vld1q_s16(static_cast<const int16_t*>(x1) + 8 * i);
    int32x4_t &low = acc[i / 2].part[i % 2 * 2], &high = acc[i / 2].part[i % 2 * 2 + 1];
    low = vmlal_n_s16(vmlal_n_s16(low, vget_low_s16(first), weight[0]), vget_low_s16(second), weight[1]);
    high = vmlal_high_n_s16(vmlal_high_n_s16(high, first, weight[0]), second, weight[1]);
  });
}

template <int vectors>
LEPTON_INLINE void dot_group(I32x16 (&acc)[vectors], const void* x, const uint8_t* w) {
  int32_t quad;
  __builtin_memcpy(&quad, w, 4);
  const int8x16_t weights = vreinterpretq_s8_s32(vdupq_n_s32(quad));
  unroll<4 * vectors>([&]<int i>() LEPTON_LAMBDA_INLINE {  // four rows
    int32x4_t& sums = acc[i / 4].part[i % 4];
    sums = vdotq_s32(sums, vld1q_s8(static_cast<const int8_t*>(x) + 16 * i), weights);
  });
}

#if !defined(LEPTON_ISA_NEONI8MM)  // simd/neoni8mm.h has its own products

constexpr int kInt8Rows = 6, kInt8Panels = 1;  // 24 sums + 4 weights + 4 activations of 32 registers
constexpr int kInt4Rows = 4, kInt4Panels = 1;  // 16 sums + 4 activations + 4 weights + the mask

// A quad in the lowest lane, for sdot by element: a plain load, where one to all lanes (ld1r) takes a place among the
// products.
LEPTON_INLINE int8x16_t load_quad(const uint8_t* a) {
  int8x16_t quad;
  asm("ldr %s0, %1" : "=w"(quad) : "m"(*reinterpret_cast<const uint8_t (*)[4]>(a)));
  return quad;
}

template <int rows>
LEPTON_INLINE void dot_s8(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const int8_t* w) {
  int8x16_t columns[4];
  unroll<4>([&]<int i>() LEPTON_LAMBDA_INLINE { columns[i] = vld1q_s8(w + 16 * i); });
  unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
    const int8x16_t quad = load_quad(a + r * lda);
    unroll<4>([&]<int i>()
                  LEPTON_LAMBDA_INLINE { acc[r].part[i] = vdotq_laneq_s32(acc[r].part[i], columns[i], quad, 0); });
  });
}

template <int rows>
LEPTON_INLINE void dot_u4(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  int8x16_t quads[rows];  // sixteen k of every row
  unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE { quads[r] = vreinterpretq_s8_u8(vld1q_u8(a + r * lda)); });
  unroll<8>([&]<int v>() LEPTON_LAMBDA_INLINE {
    constexpr int q = v / 4 * 2, i = v % 4;
    const uint8x16_t pair = vld1q_u8(w + 16 * v);
    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(pair, vdupq_n_u8(0xf)));
    const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(pair, 4));
    unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
      acc[r].part[i] = vdotq_laneq_s32(acc[r].part[i], low, quads[r], q);
      acc[r].part[i] = vdotq_laneq_s32(acc[r].part[i], high, quads[r], q + 1);
    });
  });
}
#endif

}  // namespace
}  // namespace lepton::LEPTON_ISA
