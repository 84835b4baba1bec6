// generic.h - the vector operations in plain C++: the meaning of every other header, and what runs below AVX2.
#pragma once

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kQuadBytes = 4;  // a quad of activations is its four bytes
constexpr int kInt8Rows = 2, kInt8Panels = 1;
constexpr int kInt4Rows = 2, kInt4Panels = 1;
constexpr int kSplitSums = 0;
constexpr int kFloatRows = 2;
constexpr int kDirectSums = 4;

struct F32x16 {
  float lane[16];
};
struct I32x16 {
  int32_t lane[16];
};

#define LEPTON_LANES(V, expression)                      \
  V out;                                                 \
  for (int i = 0; i < 16; ++i) out.lane[i] = expression; \
  return out

LEPTON_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
LEPTON_INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

LEPTON_INLINE float f32_from_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude << 13));  // infinity, NaN
  // 2^112 moves the exponent's bias from 15 to 127, for subnormal halves too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

LEPTON_INLINE uint16_t f16_from_f32(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000)  // below 2^-14: adding 1/2 leaves a multiple of 2^-24, rounded to even, in the low bits
    return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  const uint32_t odd = (magnitude >> 13) & 1;
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + odd) >> 13));
}

LEPTON_INLINE uint16_t bf16_from_f32(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <Dtype dtype>
LEPTON_INLINE F32x16 load_f32(const void* p) {
  F32x16 out;
  if constexpr (dtype == Dtype::f32) {
    __builtin_memcpy(&out, p, sizeof(out));
  } else {
    uint16_t half[16];
    __builtin_memcpy(half, p, sizeof(half));
    for (int i = 0; i < 16; ++i)
      out.lane[i] = dtype == Dtype::bf16 ? float_of(uint32_t(half[i]) << 16) : f32_from_f16(half[i]);
  }
  return out;
}

template <Dtype dtype>
LEPTON_INLINE void store_f32(void* p, F32x16 v) {
  if constexpr (dtype == Dtype::f32) {
    __builtin_memcpy(p, &v, sizeof(v));
  } else {
    uint16_t half[16];
    for (int i = 0; i < 16; ++i) half[i] = dtype == Dtype::bf16 ? bf16_from_f32(v.lane[i]) : f16_from_f32(v.lane[i]);
    __builtin_memcpy(p, half, sizeof(half));
  }
}

LEPTON_INLINE F32x16 broadcast_f32(float x) { LEPTON_LANES(F32x16, x); }
LEPTON_INLINE F32x16 add(F32x16 a, F32x16 b) { LEPTON_LANES(F32x16, a.lane[i] + b.lane[i]); }
LEPTON_INLINE F32x16 sub(F32x16 a, F32x16 b) { LEPTON_LANES(F32x16, a.lane[i] - b.lane[i]); }
LEPTON_INLINE F32x16 mul(F32x16 a, F32x16 b) { LEPTON_LANES(F32x16, a.lane[i] * b.lane[i]); }
LEPTON_INLINE F32x16 div(F32x16 a, F32x16 b) { LEPTON_LANES(F32x16, a.lane[i] / b.lane[i]); }
LEPTON_INLINE F32x16 min(F32x16 a, F32x16 b) { LEPTON_LANES(F32x16, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
LEPTON_INLINE F32x16 max(F32x16 a, F32x16 b) { LEPTON_LANES(F32x16, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
LEPTON_INLINE F32x16 fmadd(F32x16 a, F32x16 b, F32x16 c) { LEPTON_LANES(F32x16, a.lane[i] * b.lane[i] + c.lane[i]); }
// 1.5 * 2^23 pushes the fraction out of the mantissa: the sum rounds to nearest even.
LEPTON_INLINE I32x16 round_i32(F32x16 v) { LEPTON_LANES(I32x16, int32_t(bits_of(v.lane[i] + 0x1.8p23f)) - 0x4b400000); }
LEPTON_INLINE F32x16 to_f32(I32x16 v) { LEPTON_LANES(F32x16, float(v.lane[i])); }
LEPTON_INLINE F32x16 as_f32(I32x16 v) { LEPTON_LANES(F32x16, float_of(uint32_t(v.lane[i]))); }

LEPTON_INLINE I32x16 as_i32(F32x16 v) { LEPTON_LANES(I32x16, int32_t(bits_of(v.lane[i]))); }

LEPTON_INLINE I32x16 broadcast_i32(int32_t x) { LEPTON_LANES(I32x16, x); }
LEPTON_INLINE I32x16 load_u8(const uint8_t* p) { LEPTON_LANES(I32x16, p[i]); }
LEPTON_INLINE I32x16 load_i32(const void* p) {
  I32x16 out;
  __builtin_memcpy(&out, p, sizeof(out));
  return out;
}
LEPTON_INLINE void store_i32(void* p, I32x16 x) { __builtin_memcpy(p, &x, sizeof(x)); }
LEPTON_INLINE I32x16 add(I32x16 a, I32x16 b) { LEPTON_LANES(I32x16, a.lane[i] + b.lane[i]); }
LEPTON_INLINE I32x16 sub(I32x16 a, I32x16 b) { LEPTON_LANES(I32x16, a.lane[i] - b.lane[i]); }
LEPTON_INLINE I32x16 mul(I32x16 a, I32x16 b) { LEPTON_LANES(I32x16, a.lane[i] * b.lane[i]); }
LEPTON_INLINE I32x16 min(I32x16 a, I32x16 b) { LEPTON_LANES(I32x16, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
LEPTON_INLINE I32x16 max(I32x16 a, I32x16 b) { LEPTON_LANES(I32x16, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
LEPTON_INLINE I32x16 bit_and(I32x16 a, I32x16 b) { LEPTON_LANES(I32x16, a.lane[i] & b.lane[i]); }
LEPTON_INLINE I32x16 bit_xor(I32x16 a, I32x16 b) { LEPTON_LANES(I32x16, a.lane[i] ^ b.lane[i]); }
template <int n>
LEPTON_INLINE I32x16 shift_left(I32x16 a) {
  LEPTON_LANES(I32x16, int32_t(uint32_t(a.lane[i]) << n));
}
template <int n>
LEPTON_INLINE I32x16 shift_right(I32x16 a) {
  LEPTON_LANES(I32x16, int32_t(uint32_t(a.lane[i]) >> n));
}
template <int n>
LEPTON_INLINE I32x16 shift_right_signed(I32x16 a) {
  LEPTON_LANES(I32x16, a.lane[i] >> n);
}
#undef LEPTON_LANES

// Bits shift..shift + 3 of every lane as a float, 0 to 15.
template <int shift>
LEPTON_INLINE F32x16 nibble_f32(I32x16 a) {
  return to_f32(bit_and(shift_right<shift>(a), broadcast_i32(0xf)));
}

LEPTON_INLINE void store_u8(uint8_t* p, I32x16 v) {
  for (int i = 0; i < 16; ++i) p[i] = uint8_t(v.lane[i]);
}
LEPTON_INLINE void store_64(uint8_t* p, const I32x16 (&x)[4], bool biased) {
  for (int i = 0; i < 64; ++i) {
    const int32_t value = x[i / 16].lane[i % 16];
    p[i] = uint8_t((value < -128 ? -128 : value > 127 ? 127 : value) + (biased ? 0 : 128));
  }
}
LEPTON_INLINE void store_quads(uint8_t* p, I32x16 v) { store_u8(p, v); }

template <int rows, typename Activation>
LEPTON_INLINE void dot_quad(I32x16 (&acc)[rows], const Activation* a, int64_t lda, const int8_t* w) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 16; ++c)
      for (int i = 0; i < 4; ++i) acc[r].lane[c] += int32_t(a[r * lda + i]) * w[4 * c + i];
}

template <int rows>
LEPTON_INLINE void dot_s8(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const int8_t* w) {
  dot_quad<rows>(acc, a, lda, w);
}

template <int rows>
LEPTON_INLINE void dot_u4(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  int8_t quad[64];
  for (int q = 0; q < 4; ++q, a += 4) {
    for (int i = 0; i < 64; ++i) quad[i] = int8_t((w[64 * (q / 2) + i] >> (4 * (q % 2))) & 0xf);
    dot_quad<rows>(acc, reinterpret_cast<const int8_t*>(a), lda, quad);
  }
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
