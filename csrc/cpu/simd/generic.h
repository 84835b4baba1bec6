// generic.h - the vector operations in plain C++: the meaning of every other header, and what runs below AVX2.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace lepton::LEPTON_ISA {
namespace {

// A quad of activations is int16, in the order k0 k2 k1 k3: SSE2, which every x86-64 has, multiplies pairs of those.
constexpr int kQuadBytes = 8;
constexpr int kInt8Rows = 2, kInt8Panels = 1;
constexpr int kInt4Rows = 2, kInt4Panels = 1;
constexpr int kInt16Rows = 2;
constexpr int kSplitSums = 0;
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
LEPTON_INLINE I32x16 load_s8(const uint8_t* p) { LEPTON_LANES(I32x16, int8_t(p[i])); }
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

LEPTON_INLINE void store_u8(uint8_t* p, I32x16 v) {
  for (int i = 0; i < 16; ++i) p[i] = uint8_t(v.lane[i]);
}
LEPTON_INLINE void store_64(uint8_t* p, const I32x16 (&x)[4], bool biased) {
  const int bias = biased ? 0 : 128;
  for (const I32x16& v : x)
    for (const int32_t lane : v.lane) *p++ = uint8_t((lane < -128 ? -128 : lane > 127 ? 127 : lane) + bias);
}
LEPTON_INLINE void store_int16_quads(uint8_t* p, I32x16 v) {
  int16_t quads[16];
  for (int i = 0; i < 16; ++i) quads[i / 4 * 4 + i % 2 * 2 + i / 2 % 2] = int16_t(v.lane[i]);
  __builtin_memcpy(p, quads, sizeof(quads));
}
LEPTON_INLINE void store_quads(uint8_t* p, I32x16 v) { store_int16_quads(p, v); }

// Two int16 (k0 and k2, or k1 and k3) of each of four columns, of one lane.
#if defined(__SSE2__)
using Pairs = __m128i;
LEPTON_INLINE Pairs load_pairs(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
LEPTON_INLINE Pairs broadcast_pair(const uint8_t* a) {
  int32_t pair;
  __builtin_memcpy(&pair, a, 4);
  return _mm_set1_epi32(pair);
}
template <bool high>
LEPTON_INLINE Pairs widen_bytes(Pairs w) {
  return _mm_srai_epi16(high ? w : _mm_slli_epi16(w, 8), 8);
}
template <int nibble>
LEPTON_INLINE Pairs widen_nibble(Pairs w) {
  return _mm_and_si128(_mm_srli_epi16(w, 4 * nibble), _mm_set1_epi16(0xf));
}
// Four int16 of each in turn, the lower or the upper ones.
template <int half>
LEPTON_INLINE Pairs interleave(Pairs a, Pairs b) {
  return half ? _mm_unpackhi_epi16(a, b) : _mm_unpacklo_epi16(a, b);
}
LEPTON_INLINE void add_products(int32_t* acc, Pairs a, Pairs w) {
  __m128i* const sums = reinterpret_cast<__m128i*>(acc);
  _mm_storeu_si128(sums, _mm_add_epi32(_mm_loadu_si128(sums), _mm_madd_epi16(a, w)));
}
#else
struct Pairs {
  int16_t k[8];
};
LEPTON_INLINE Pairs load_pairs(const void* p) {
  Pairs out;
  __builtin_memcpy(&out, p, sizeof(out));
  return out;
}
LEPTON_INLINE Pairs broadcast_pair(const uint8_t* a) {
  Pairs out;
  for (int i = 0; i < 4; ++i) __builtin_memcpy(out.k + 2 * i, a, 4);
  return out;
}
template <bool high>
LEPTON_INLINE Pairs widen_bytes(Pairs w) {
  for (int16_t& k : w.k) k = high ? int16_t(k >> 8) : int16_t(int8_t(k));
  return w;
}
template <int nibble>
LEPTON_INLINE Pairs widen_nibble(Pairs w) {
  for (int16_t& k : w.k) k = int16_t(uint16_t(k) >> (4 * nibble) & 0xf);
  return w;
}
template <int half>
LEPTON_INLINE Pairs interleave(Pairs a, Pairs b) {
  Pairs out;
  for (int i = 0; i < 8; ++i) out.k[i] = (i % 2 ? b : a).k[4 * half + i / 2];
  return out;
}
LEPTON_INLINE void add_products(int32_t* acc, Pairs a, Pairs w) {
  for (int i = 0; i < 4; ++i) acc[i] += int32_t(a.k[2 * i]) * w.k[2 * i] + int32_t(a.k[2 * i + 1]) * w.k[2 * i + 1];
}
#endif

LEPTON_INLINE void store_turned(int16_t* p, const I32x16 (&rows)[1]) {
  for (int i = 0; i < 16; ++i) p[i] = int16_t(rows[0].lane[i]);
}

template <int vectors>
LEPTON_INLINE void dot_pair(I32x16 (&acc)[vectors], const void* x0, const void* x1, const uint8_t* w) {
  const Pairs weights = broadcast_pair(w);
  unroll<2 * vectors>([&]<int i>() LEPTON_LAMBDA_INLINE {  // eight rows
    const Pairs first = load_pairs(static_cast<const int16_t*>(x0) + 8 * i);
    const Pairs second = load_pairs(static_cast<const int16_t*>(x1) + 8 * i);
    int32_t* const sums = acc[i / 2].lane + i % 2 * 8;
    add_products(sums, interleave<0>(first, second), weights);
    add_products(sums + 4, interleave<1>(first, second), weights);
  });
}

template <int vectors>
LEPTON_INLINE void dot_group(I32x16 (&acc)[vectors], const void* x, const uint8_t* w) {
  const Pairs weights = broadcast_pair(w);
  unroll<4 * vectors>([&]<int i>() LEPTON_LAMBDA_INLINE {  // four rows
    add_products(acc[i / 4].lane + i % 4 * 4, load_pairs(static_cast<const int16_t*>(x) + 8 * i), weights);
  });
}

template <int rows>
LEPTON_INLINE void dot_int16_s8(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const int8_t* w) {
  unroll<4>([&]<int c>() LEPTON_LAMBDA_INLINE {
    const Pairs bytes = load_pairs(w + 16 * c), even = widen_bytes<false>(bytes), odd = widen_bytes<true>(bytes);
    unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
      add_products(acc[r].lane + 4 * c, broadcast_pair(a + r * lda), even);
      add_products(acc[r].lane + 4 * c, broadcast_pair(a + r * lda + 4), odd);
    });
  });
}

template <int rows>
LEPTON_INLINE void dot_s8(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const int8_t* w) {
  dot_int16_s8<rows>(acc, a, lda, w);
}

template <int rows>
LEPTON_INLINE void dot_int16_u4(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  unroll<8>([&]<int v>() LEPTON_LAMBDA_INLINE {
    constexpr int c = v % 4;
    const Pairs nibbles = load_pairs(w + 16 * v);
    unroll<4>([&]<int i>() LEPTON_LAMBDA_INLINE {
      const Pairs weights = widen_nibble<i>(nibbles);
      unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
        add_products(acc[r].lane + 4 * c, broadcast_pair(a + r * lda + v / 4 * 16 + 4 * kPairOfNibble<i>), weights);
      });
    });
  });
}

template <int rows>
LEPTON_INLINE void dot_u4(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  uint8_t quads[rows][16 * sizeof(int16_t)];
  for (int r = 0; r < rows; ++r) {
    I32x16 k;
    for (int i = 0; i < 16; ++i) k.lane[i] = int8_t(a[r * lda + i]);
    store_int16_quads(quads[r], k);
  }
  dot_int16_u4<rows>(acc, quads[0], sizeof(quads[0]), w);
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
