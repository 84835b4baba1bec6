// avx512vnni.h - the vector operations in one 512-bit register.
#pragma once

#include <immintrin.h>

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kQuadBytes = 4;                  // vpdpbusd takes the four bytes as they are
constexpr int kInt8Rows = 6, kInt8Panels = 4;  // 24 sums + 4 weights of 32 registers
constexpr int kInt4Rows = 6, kInt4Panels = 2;  // 12 sums + 8 weights
constexpr int kSplitSums = 4;
constexpr int kDirectSums = 8;  // of 32 registers: two units, four cycles

struct F32x16 {
  __m512 v;
};
struct I32x16 {
  __m512i v;
};

template <Dtype dtype>
LEPTON_INLINE F32x16 load_f32(const void* p) {
  if constexpr (dtype == Dtype::f32) return {_mm512_loadu_ps(p)};
  const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  if constexpr (dtype == Dtype::bf16) return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  return {_mm512_cvtph_ps(half)};
}

template <Dtype dtype>
LEPTON_INLINE void store_f32(void* p, F32x16 x) {
  if constexpr (dtype == Dtype::f32) {
    _mm512_storeu_ps(p, x.v);
  } else if constexpr (dtype == Dtype::bf16) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
  }
}

LEPTON_INLINE F32x16 broadcast_f32(float x) { return {_mm512_set1_ps(x)}; }
LEPTON_INLINE F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
LEPTON_INLINE F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
LEPTON_INLINE F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
LEPTON_INLINE F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
LEPTON_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
LEPTON_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
LEPTON_INLINE F32x16 fmadd(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LEPTON_INLINE I32x16 round_i32(F32x16 x) { return {_mm512_cvtps_epi32(x.v)}; }
LEPTON_INLINE F32x16 to_f32(I32x16 x) { return {_mm512_cvtepi32_ps(x.v)}; }
LEPTON_INLINE F32x16 as_f32(I32x16 x) { return {_mm512_castsi512_ps(x.v)}; }

LEPTON_INLINE I32x16 as_i32(F32x16 x) { return {_mm512_castps_si512(x.v)}; }

LEPTON_INLINE I32x16 broadcast_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
LEPTON_INLINE I32x16 load_i32(const void* p) { return {_mm512_loadu_si512(p)}; }
LEPTON_INLINE I32x16 load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
LEPTON_INLINE I32x16 load_s8(const uint8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
LEPTON_INLINE void store_i32(void* p, I32x16 x) { _mm512_storeu_si512(p, x.v); }
LEPTON_INLINE I32x16 add(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
LEPTON_INLINE I32x16 sub(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LEPTON_INLINE I32x16 mul(I32x16 a, I32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
LEPTON_INLINE I32x16 min(I32x16 a, I32x16 b) { return {_mm512_min_epi32(a.v, b.v)}; }
LEPTON_INLINE I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
LEPTON_INLINE I32x16 bit_and(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
LEPTON_INLINE I32x16 bit_xor(I32x16 a, I32x16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n>
LEPTON_INLINE I32x16 shift_left(I32x16 a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
LEPTON_INLINE I32x16 shift_right(I32x16 a) {
  return {_mm512_srli_epi32(a.v, n)};
}
template <int n>
LEPTON_INLINE I32x16 shift_right_signed(I32x16 a) {
  return {_mm512_srai_epi32(a.v, n)};
}

// Bits shift..shift + 3 of every lane as a float, 0 to 15.
template <int shift>
LEPTON_INLINE F32x16 nibble_f32(I32x16 a) {
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(a.v, shift), values)};  // it reads the lowest four bits alone
}

LEPTON_INLINE void store_u8(uint8_t* p, I32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
LEPTON_INLINE void store_quads(uint8_t* p, I32x16 x) { store_u8(p, x); }
LEPTON_INLINE void store_64(uint8_t* p, const I32x16 (&x)[4], bool biased) {
  // Packs work on each 128 bits; the permutation puts their 32-bit pieces, 0 to 15 by value, back in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(x[0].v, x[1].v), _mm512_packs_epi32(x[2].v, x[3].v));
  const __m512i flip = _mm512_set1_epi8(biased ? 0 : -128);
  _mm512_storeu_si512(p, _mm512_xor_si512(_mm512_permutexvar_epi32(order, bytes), flip));
}

LEPTON_INLINE __m512i broadcast_quad(const uint8_t* a) {
  int32_t quad;
  __builtin_memcpy(&quad, a, 4);
  return _mm512_set1_epi32(quad);
}

// Packs work on each 128 bits: four rows of the first sixteen, four of the others. The unpacks of dot_pair undo it.
LEPTON_INLINE void store_turned(int16_t* p, const I32x16 (&rows)[2]) {
  _mm512_storeu_si512(p, _mm512_packs_epi32(rows[0].v, rows[1].v));
}

template <int vectors>
LEPTON_INLINE void dot_pair(I32x16 (&acc)[vectors], const void* x0, const void* x1, const uint8_t* w) {
  const __m512i weights = broadcast_quad(w);
  unroll<vectors / 2>([&]<int v>() LEPTON_LAMBDA_INLINE {
    const __m512i first = _mm512_loadu_si512(static_cast<const __m512i*>(x0) + v);
    const __m512i second = _mm512_loadu_si512(static_cast<const __m512i*>(x1) + v);
    acc[2 * v].v = _mm512_dpwssd_epi32(acc[2 * v].v, _mm512_unpacklo_epi16(first, second), weights);
    acc[2 * v + 1].v = _mm512_dpwssd_epi32(acc[2 * v + 1].v, _mm512_unpackhi_epi16(first, second), weights);
  });
}

template <int vectors>
LEPTON_INLINE void dot_group(I32x16 (&acc)[vectors], const void* x, const uint8_t* w) {
  const __m512i weights = broadcast_quad(w);
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
    acc[v].v = _mm512_dpbusd_epi32(acc[v].v, _mm512_loadu_si512(static_cast<const __m512i*>(x) + v), weights);
  });
}

template <int rows>
LEPTON_INLINE void dot_s8(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const int8_t* w) {
  const __m512i weights = _mm512_loadu_si512(w);
  unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
    acc[r].v = _mm512_dpbusd_epi32(acc[r].v, broadcast_quad(a + r * lda), weights);
  });
}

template <int rows>
LEPTON_INLINE void dot_u4(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  const __m512i low = _mm512_set1_epi8(0xf);
  for (int j = 0; j < 2; ++j, a += 8) {
    const __m512i pair = _mm512_loadu_si512(w + 64 * j);
    const __m512i first = _mm512_and_si512(pair, low), second = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low);
    unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
      acc[r].v = _mm512_dpbusd_epi32(acc[r].v, first, broadcast_quad(a + r * lda));
      acc[r].v = _mm512_dpbusd_epi32(acc[r].v, second, broadcast_quad(a + r * lda + 4));
    });
  }
}

// High nibbles stay in their half of a byte. That saves a shift, which one unit of two can do, and the sums are twice
// as many: four would wait for each other's latency.
template <int rows>
LEPTON_INLINE void dot_u4(I32x16 (&low)[rows], I32x16 (&high)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  unroll<2>([&]<int j>() LEPTON_LAMBDA_INLINE {
    const __m512i pair = _mm512_loadu_si512(w + 64 * j);
    const __m512i first = _mm512_and_si512(pair, _mm512_set1_epi8(0xf));
    const __m512i second = _mm512_and_si512(pair, _mm512_set1_epi8(int8_t(0xf0)));
    unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
      low[r].v = _mm512_dpbusd_epi32(low[r].v, first, broadcast_quad(a + r * lda + 8 * j));
      high[r].v = _mm512_dpbusd_epi32(high[r].v, second, broadcast_quad(a + r * lda + 8 * j + 4));
    });
  });
}

constexpr int kUnpackedStep = kQuad;

template <int rows>
LEPTON_INLINE void dot_unpacked(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  const __m512i weights = _mm512_load_si512(w);
  unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
    acc[r].v = _mm512_dpbusd_epi32(acc[r].v, weights, broadcast_quad(a + r * lda));
  });
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
