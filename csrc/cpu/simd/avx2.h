// avx2.h - the vector operations in two 256-bit registers.
#pragma once

#include <immintrin.h>

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kDirectSums = 4;  // 8 of 16 registers

struct F32x16 {
  __m256 half[2];
};
struct I32x16 {
  __m256i half[2];
};

#define LEPTON_HALVES(V, expression)                    \
  V out;                                                \
  for (int h = 0; h < 2; ++h) out.half[h] = expression; \
  return out

template <Dtype dtype>
LEPTON_INLINE F32x16 load_f32(const void* p) {
  if constexpr (dtype == Dtype::f32) {
    LEPTON_HALVES(F32x16, _mm256_loadu_ps(static_cast<const float*>(p) + 8 * h));
  } else if constexpr (dtype == Dtype::bf16) {
    LEPTON_HALVES(F32x16, _mm256_castsi256_ps(_mm256_slli_epi32(
                              _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p) + h)), 16)));
  } else {
    LEPTON_HALVES(F32x16, _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p) + h)));
  }
}

template <Dtype dtype>
LEPTON_INLINE void store_f32(void* p, F32x16 v) {
  for (int h = 0; h < 2; ++h) {
    if constexpr (dtype == Dtype::f32) {
      _mm256_storeu_ps(static_cast<float*>(p) + 8 * h, v.half[h]);
    } else if constexpr (dtype == Dtype::bf16) {
      const __m256i bits = _mm256_castps_si256(v.half[h]);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.half[h], v.half[h], _CMP_UNORD_Q));
      const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
      _mm_storeu_si128(static_cast<__m128i*>(p) + h, _mm256_castsi256_si128(packed));
    } else {
      _mm_storeu_si128(static_cast<__m128i*>(p) + h, _mm256_cvtps_ph(v.half[h], _MM_FROUND_TO_NEAREST_INT));
    }
  }
}

LEPTON_INLINE F32x16 broadcast_f32(float x) { LEPTON_HALVES(F32x16, _mm256_set1_ps(x)); }
LEPTON_INLINE F32x16 add(F32x16 a, F32x16 b) { LEPTON_HALVES(F32x16, _mm256_add_ps(a.half[h], b.half[h])); }
LEPTON_INLINE F32x16 sub(F32x16 a, F32x16 b) { LEPTON_HALVES(F32x16, _mm256_sub_ps(a.half[h], b.half[h])); }
LEPTON_INLINE F32x16 mul(F32x16 a, F32x16 b) { LEPTON_HALVES(F32x16, _mm256_mul_ps(a.half[h], b.half[h])); }
LEPTON_INLINE F32x16 div(F32x16 a, F32x16 b) { LEPTON_HALVES(F32x16, _mm256_div_ps(a.half[h], b.half[h])); }
LEPTON_INLINE F32x16 min(F32x16 a, F32x16 b) { LEPTON_HALVES(F32x16, _mm256_min_ps(a.half[h], b.half[h])); }
LEPTON_INLINE F32x16 max(F32x16 a, F32x16 b) { LEPTON_HALVES(F32x16, _mm256_max_ps(a.half[h], b.half[h])); }
LEPTON_INLINE F32x16 fmadd(F32x16 a, F32x16 b, F32x16 c) {
  LEPTON_HALVES(F32x16, _mm256_fmadd_ps(a.half[h], b.half[h], c.half[h]));
}
LEPTON_INLINE I32x16 round_i32(F32x16 v) { LEPTON_HALVES(I32x16, _mm256_cvtps_epi32(v.half[h])); }
LEPTON_INLINE F32x16 to_f32(I32x16 v) { LEPTON_HALVES(F32x16, _mm256_cvtepi32_ps(v.half[h])); }
LEPTON_INLINE F32x16 as_f32(I32x16 v) { LEPTON_HALVES(F32x16, _mm256_castsi256_ps(v.half[h])); }

LEPTON_INLINE I32x16 as_i32(F32x16 v) { LEPTON_HALVES(I32x16, _mm256_castps_si256(v.half[h])); }

LEPTON_INLINE I32x16 broadcast_i32(int32_t x) { LEPTON_HALVES(I32x16, _mm256_set1_epi32(x)); }
LEPTON_INLINE I32x16 load_i32(const void* p) {
  LEPTON_HALVES(I32x16, _mm256_loadu_si256(static_cast<const __m256i*>(p) + h));
}
LEPTON_INLINE I32x16 load_u8(const uint8_t* p) {
  LEPTON_HALVES(I32x16, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * h))));
}
LEPTON_INLINE I32x16 load_s8(const uint8_t* p) {
  LEPTON_HALVES(I32x16, _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * h))));
}
LEPTON_INLINE void store_i32(void* p, I32x16 x) {
  for (int h = 0; h < 2; ++h) _mm256_storeu_si256(static_cast<__m256i*>(p) + h, x.half[h]);
}
LEPTON_INLINE I32x16 add(I32x16 a, I32x16 b) { LEPTON_HALVES(I32x16, _mm256_add_epi32(a.half[h], b.half[h])); }
LEPTON_INLINE I32x16 sub(I32x16 a, I32x16 b) { LEPTON_HALVES(I32x16, _mm256_sub_epi32(a.half[h], b.half[h])); }
LEPTON_INLINE I32x16 mul(I32x16 a, I32x16 b) { LEPTON_HALVES(I32x16, _mm256_mullo_epi32(a.half[h], b.half[h])); }
LEPTON_INLINE I32x16 min(I32x16 a, I32x16 b) { LEPTON_HALVES(I32x16, _mm256_min_epi32(a.half[h], b.half[h])); }
LEPTON_INLINE I32x16 max(I32x16 a, I32x16 b) { LEPTON_HALVES(I32x16, _mm256_max_epi32(a.half[h], b.half[h])); }
LEPTON_INLINE I32x16 bit_and(I32x16 a, I32x16 b) { LEPTON_HALVES(I32x16, _mm256_and_si256(a.half[h], b.half[h])); }
LEPTON_INLINE I32x16 bit_xor(I32x16 a, I32x16 b) { LEPTON_HALVES(I32x16, _mm256_xor_si256(a.half[h], b.half[h])); }
template <int n>
LEPTON_INLINE I32x16 shift_left(I32x16 a) {
  LEPTON_HALVES(I32x16, _mm256_slli_epi32(a.half[h], n));
}
template <int n>
LEPTON_INLINE I32x16 shift_right(I32x16 a) {
  LEPTON_HALVES(I32x16, _mm256_srli_epi32(a.half[h], n));
}
template <int n>
LEPTON_INLINE I32x16 shift_right_signed(I32x16 a) {
  LEPTON_HALVES(I32x16, _mm256_srai_epi32(a.half[h], n));
}
#undef LEPTON_HALVES

LEPTON_INLINE __m256i pack_u16(I32x16 v) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(v.half[0], v.half[1]), 0xd8);
}

LEPTON_INLINE void store_u8(uint8_t* p, I32x16 v) {
  const __m256i words = pack_u16(v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
LEPTON_INLINE void store_64(uint8_t* p, const I32x16 (&x)[4], bool biased) {
  // Packs work on each 128 bits; the permutation puts their 32-bit pieces, 0 to 7 by value, back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i flip = _mm256_set1_epi8(biased ? 0 : -128);
  for (int i = 0; i < 2; ++i) {
    const __m256i first = _mm256_packs_epi32(x[2 * i].half[0], x[2 * i].half[1]);
    const __m256i second = _mm256_packs_epi32(x[2 * i + 1].half[0], x[2 * i + 1].half[1]);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + i, _mm256_xor_si256(bytes, flip));
  }
}

LEPTON_INLINE __m256i broadcast_quad(const uint8_t* a) {
  int32_t quad;
  __builtin_memcpy(&quad, a, 4);
  return _mm256_set1_epi32(quad);
}

// Packs work on each 128 bits: rows 0-3, 8-11, 4-7, 12-15, which the unpacks of dot_pair undo.
LEPTON_INLINE void store_turned(int16_t* p, const I32x16 (&rows)[1]) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_packs_epi32(rows[0].half[0], rows[0].half[1]));
}

LEPTON_INLINE __m256i add_int16_products(__m256i acc, __m256i a, __m256i w) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(acc, a, w);
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, w));
#endif
}

template <int vectors>
LEPTON_INLINE void dot_pair(I32x16 (&acc)[vectors], const void* x0, const void* x1, const uint8_t* w) {
  const __m256i weights = broadcast_quad(w);
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
    const __m256i first = _mm256_loadu_si256(static_cast<const __m256i*>(x0) + v);
    const __m256i second = _mm256_loadu_si256(static_cast<const __m256i*>(x1) + v);
    acc[v].half[0] = add_int16_products(acc[v].half[0], _mm256_unpacklo_epi16(first, second), weights);
    acc[v].half[1] = add_int16_products(acc[v].half[1], _mm256_unpackhi_epi16(first, second), weights);
  });
}

template <int vectors>
LEPTON_INLINE void dot_group(I32x16 (&acc)[vectors], const void* x, const uint8_t* w) {
  const __m256i weights = broadcast_quad(w);
  unroll<2 * vectors>([&]<int h>() LEPTON_LAMBDA_INLINE {
    const __m256i activations = _mm256_loadu_si256(static_cast<const __m256i*>(x) + h);
    __m256i& sums = acc[h / 2].half[h % 2];
#if defined(__AVXVNNI__)
    sums = _mm256_dpbusd_avx_epi32(sums, activations, weights);
#else
    sums = add_int16_products(sums, activations, weights);
#endif
  });
}

#if !defined(__AVXVNNI__)  // simd/avxvnni.h has its own products
// vpmaddubsw would saturate on uint8 x int8 (255 * 127 * 2 > 32767), so int8 products run as int16 by vpmaddwd, which
// is exact: a quad k0 k1 k2 k3 of activations is stored as the int16 pairs (k0, k2) and (k1, k3).
constexpr int kQuadBytes = 8;
constexpr int kInt8Rows = 6, kInt8Panels = 1;  // 12 sums + 2 weights + 1 activation of 16 registers
constexpr int kInt4Rows = 4, kInt4Panels = 1;  // 8 sums + 4 weights + 2
constexpr int kInt16Rows = 6;                  // as with int8
constexpr int kSplitSums = 0;
constexpr int kNarrowRows = 4;  // 8 sums + 4 weights + ones + 2

LEPTON_INLINE void store_int16_quads(uint8_t* p, I32x16 v) {
  const __m128i even_odd = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.half[0], v.half[1]), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(even_odd)));
}
LEPTON_INLINE void store_quads(uint8_t* p, I32x16 v) { store_int16_quads(p, v); }

// acc += a0 * w0 + a1 * w1 of int16 pairs. The sums fill the registers: left to itself gcc computes products ahead,
// adds them to each other first, and spills most of the sums in every iteration.
LEPTON_INLINE void add_products(__m256i& acc, __m256i a, __m256i w) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(a), "x"(w));
}

template <int rows>
LEPTON_INLINE void dot_int16_s8(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const int8_t* w) {
  unroll<2>([&]<int odd>() LEPTON_LAMBDA_INLINE {
    __m256i pair[2];  // int16 (k0, k2) or (k1, k3) of 8 columns
    unroll<2>([&]<int h>() LEPTON_LAMBDA_INLINE {
      const __m256i quad = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + h);
      pair[h] = _mm256_srai_epi16(odd ? quad : _mm256_slli_epi16(quad, 8), 8);
    });
    unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
      const __m256i activation = broadcast_quad(a + r * lda + 4 * odd);
      add_products(acc[r].half[0], activation, pair[0]);
      add_products(acc[r].half[1], activation, pair[1]);
    });
  });
}

template <int rows>
LEPTON_INLINE void dot_s8(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const int8_t* w) {
  dot_int16_s8<rows>(acc, a, lda, w);
}

// Narrow weights, eight k: the products of two quads fit int16 together, and vpmaddubsw is exact.
template <int rows>
LEPTON_INLINE void dot_narrow(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const int8_t* w) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i* const quads = reinterpret_cast<const __m256i*>(w);
  unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
    const __m256i first = broadcast_quad(a + r * lda), second = broadcast_quad(a + r * lda + kQuad);
    unroll<2>([&]<int h>() LEPTON_LAMBDA_INLINE {
      const __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(first, _mm256_loadu_si256(quads + h)),
                                           _mm256_maddubs_epi16(second, _mm256_loadu_si256(quads + 2 + h)));
      add_products(acc[r].half[h], sum, ones);
    });
  });
}

// Two shifts and no mask, whose register the sums need.
template <int nibble>
LEPTON_INLINE __m256i widen_nibble(__m256i w) {
  return _mm256_srli_epi16(_mm256_slli_epi16(w, 12 - 4 * nibble), 12);
}

template <int rows>
LEPTON_INLINE void dot_int16_u4(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  unroll<8>([&]<int i>() LEPTON_LAMBDA_INLINE {
    constexpr int nibble = i % 4;
    __m256i weights[2];
    unroll<2>([&]<int h>() LEPTON_LAMBDA_INLINE {
      weights[h] = widen_nibble<nibble>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + i / 4 * 2 + h));
    });
    unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
      const __m256i activation = broadcast_quad(a + r * lda + i / 4 * 16 + 4 * kPairOfNibble<nibble>);
      add_products(acc[r].half[0], activation, weights[0]);
      add_products(acc[r].half[1], activation, weights[1]);
    });
  });
}

// Here vpmaddubsw is exact: 2 * 15 * 128 = 3840, and four of them fit int16.
template <int rows>
LEPTON_INLINE void dot_u4(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  const __m256i low = _mm256_set1_epi8(0xf), ones = _mm256_set1_epi16(1);
  unroll<2>([&]<int h>() LEPTON_LAMBDA_INLINE {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + h);
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + h + 2);
    const __m256i quad[4] = {_mm256_and_si256(w0, low), _mm256_and_si256(_mm256_srli_epi16(w0, 4), low),
                             _mm256_and_si256(w1, low), _mm256_and_si256(_mm256_srli_epi16(w1, 4), low)};
    unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
      __m256i sum = _mm256_maddubs_epi16(quad[0], broadcast_quad(a + r * lda));
      for (int q = 1; q < 4; ++q)
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(quad[q], broadcast_quad(a + r * lda + 4 * q)));
      add_products(acc[r].half[h], sum, ones);
    });
  });
}

constexpr int kUnpackedStep = kNibbleBlock;

// The same of unpacked nibbles: four products in 16 bit before they are widened.
template <int rows>
LEPTON_INLINE void dot_unpacked(I32x16 (&acc)[rows], const uint8_t* a, int64_t lda, const uint8_t* w) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i* const quads = reinterpret_cast<const __m256i*>(w);
  unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
    __m256i sum[2];
    unroll<kUnpackedStep / kQuad>([&]<int q>() LEPTON_LAMBDA_INLINE {
      const __m256i activation = broadcast_quad(a + r * lda + kQuad * q);
      unroll<2>([&]<int h>() LEPTON_LAMBDA_INLINE {
        const __m256i products = _mm256_maddubs_epi16(_mm256_load_si256(quads + 2 * q + h), activation);
        sum[h] = q == 0 ? products : _mm256_add_epi16(sum[h], products);
      });
    });
    add_products(acc[r].half[0], sum[0], ones);
    add_products(acc[r].half[1], sum[1], ones);
  });
}
#endif

}  // namespace
}  // namespace lepton::LEPTON_ISA
