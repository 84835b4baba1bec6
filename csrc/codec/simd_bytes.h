// simd_bytes.h - 16 bytes in a register of SSSE3 (x86-64-v2: SSE4.1 too) or NEON, 32 in one of AVX2, for
// huffman_shuffle.h.
#pragma once

#include <stdint.h>

#if defined(__SSSE3__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include "cpu/kernel_table.h"

namespace lepton::LEPTON_ISA {
namespace {

#if defined(__SSSE3__)
using Bytes16 = __m128i;

LEPTON_INLINE Bytes16 load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
LEPTON_INLINE Bytes16 load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
LEPTON_INLINE void store8(uint8_t* p, Bytes16 v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v); }
LEPTON_INLINE void store(uint8_t* p, Bytes16 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
LEPTON_INLINE Bytes16 splat(uint8_t byte) { return _mm_set1_epi8(static_cast<char>(byte)); }
// The lower half of a register, and 8 bytes at p above it.
LEPTON_INLINE Bytes16 join8(Bytes16 low, const uint8_t* p) {
  return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(low), reinterpret_cast<const double*>(p)));
}
// The same 8 bytes in both halves.
LEPTON_INLINE Bytes16 load_twice8(const uint8_t* p) {
  return _mm_castpd_si128(_mm_loaddup_pd(reinterpret_cast<const double*>(p)));
}
// The lower halves of two registers, and the upper ones.
LEPTON_INLINE Bytes16 low_halves(Bytes16 a, Bytes16 b) { return _mm_unpacklo_epi64(a, b); }
LEPTON_INLINE Bytes16 high_halves(Bytes16 a, Bytes16 b) { return _mm_unpackhi_epi64(a, b); }
LEPTON_INLINE Bytes16 shuffle(Bytes16 bytes, Bytes16 places) { return _mm_shuffle_epi8(bytes, places); }
LEPTON_INLINE Bytes16 add(Bytes16 a, Bytes16 b) { return _mm_add_epi8(a, b); }
LEPTON_INLINE Bytes16 either(Bytes16 a, Bytes16 b) { return _mm_or_si128(a, b); }
LEPTON_INLINE Bytes16 equal(Bytes16 a, Bytes16 b) { return _mm_cmpeq_epi8(a, b); }
LEPTON_INLINE Bytes16 at_least(Bytes16 a, Bytes16 b) { return equal(_mm_max_epu8(a, b), a); }
LEPTON_INLINE Bytes16 low_nibbles(Bytes16 a) { return _mm_and_si128(a, splat(15)); }
// Bit `bit` of each byte, from 4 on, becomes its highest; the others are anything.
template <int bit>
LEPTON_INLINE Bytes16 bit_to_top(Bytes16 a) {
  return _mm_slli_epi16(a, 7 - bit);
}
// if_1 where the highest bit is 1.
LEPTON_INLINE Bytes16 choose(Bytes16 top, Bytes16 if_1, Bytes16 if_0) { return _mm_blendv_epi8(if_0, if_1, top); }
// The highest bit of each byte.
LEPTON_INLINE unsigned mask_of(Bytes16 v) { return static_cast<unsigned>(_mm_movemask_epi8(v)); }
// On 16-bit lanes.
LEPTON_INLINE Bytes16 multiply16(Bytes16 a, Bytes16 b) { return _mm_mullo_epi16(a, b); }
LEPTON_INLINE Bytes16 shift_right16(Bytes16 a, int bits) { return _mm_srl_epi16(a, _mm_cvtsi32_si128(bits)); }
LEPTON_INLINE Bytes16 narrow(Bytes16 a, Bytes16 b) { return _mm_packus_epi16(a, b); }
#else
using Bytes16 = uint8x16_t;

LEPTON_INLINE Bytes16 load8(const uint8_t* p) { return vcombine_u8(vld1_u8(p), vdup_n_u8(0)); }
LEPTON_INLINE Bytes16 load16(const uint8_t* p) { return vld1q_u8(p); }
LEPTON_INLINE void store8(uint8_t* p, Bytes16 v) { vst1_u8(p, vget_low_u8(v)); }
LEPTON_INLINE void store(uint8_t* p, Bytes16 v) { vst1q_u8(p, v); }
LEPTON_INLINE Bytes16 splat(uint8_t byte) { return vdupq_n_u8(byte); }
LEPTON_INLINE Bytes16 join8(Bytes16 low, const uint8_t* p) { return vcombine_u8(vget_low_u8(low), vld1_u8(p)); }
LEPTON_INLINE Bytes16 load_twice8(const uint8_t* p) { return vcombine_u8(vld1_u8(p), vld1_u8(p)); }
LEPTON_INLINE Bytes16 low_halves(Bytes16 a, Bytes16 b) { return vcombine_u8(vget_low_u8(a), vget_low_u8(b)); }
LEPTON_INLINE Bytes16 high_halves(Bytes16 a, Bytes16 b) { return vcombine_u8(vget_high_u8(a), vget_high_u8(b)); }
LEPTON_INLINE Bytes16 shuffle(Bytes16 bytes, Bytes16 places) { return vqtbl1q_u8(bytes, places); }
LEPTON_INLINE Bytes16 add(Bytes16 a, Bytes16 b) { return vaddq_u8(a, b); }
LEPTON_INLINE Bytes16 either(Bytes16 a, Bytes16 b) { return vorrq_u8(a, b); }
LEPTON_INLINE Bytes16 equal(Bytes16 a, Bytes16 b) { return vceqq_u8(a, b); }
LEPTON_INLINE Bytes16 at_least(Bytes16 a, Bytes16 b) { return vcgeq_u8(a, b); }
LEPTON_INLINE Bytes16 low_nibbles(Bytes16 a) { return vandq_u8(a, splat(15)); }
template <int bit>
LEPTON_INLINE Bytes16 bit_to_top(Bytes16 a) {
  return vshlq_n_u8(a, 7 - bit);
}
LEPTON_INLINE Bytes16 choose(Bytes16 top, Bytes16 if_1, Bytes16 if_0) {
  return vbslq_u8(vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(top), 7)), if_1, if_0);
}
LEPTON_INLINE unsigned mask_of(Bytes16 v) {
  const uint8x16_t bits = vandq_u8(vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(v), 7)),
                                   vcombine_u8(vcreate_u8(0x8040201008040201), vcreate_u8(0x8040201008040201)));
  return vaddv_u8(vget_low_u8(bits)) | static_cast<unsigned>(vaddv_u8(vget_high_u8(bits))) << 8;
}
LEPTON_INLINE Bytes16 multiply16(Bytes16 a, Bytes16 b) {
  return vreinterpretq_u8_u16(vmulq_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}
LEPTON_INLINE Bytes16 shift_right16(Bytes16 a, int bits) {
  return vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(a), vdupq_n_s16(static_cast<int16_t>(-bits))));
}
LEPTON_INLINE Bytes16 narrow(Bytes16 a, Bytes16 b) {
  return vcombine_u8(vmovn_u16(vreinterpretq_u16_u8(a)), vmovn_u16(vreinterpretq_u16_u8(b)));
}
#endif
LEPTON_INLINE bool any(Bytes16 v) { return mask_of(v) != 0; }

// Bytes: the widest register. A register at p; the same 16 bytes in every part of one; 16 bytes at p, then at p + step.
#if defined(__AVX2__)
using Bytes = __m256i;

LEPTON_INLINE Bytes load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
LEPTON_INLINE Bytes everywhere(Bytes16 v) { return _mm256_broadcastsi128_si256(v); }
LEPTON_INLINE Bytes load_halves(const uint8_t* p, int step) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p)), load16(p + step), 1);
}
LEPTON_INLINE void store(uint8_t* p, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
LEPTON_INLINE Bytes shuffle(Bytes bytes, Bytes places) { return _mm256_shuffle_epi8(bytes, places); }
LEPTON_INLINE Bytes add(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
LEPTON_INLINE Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
LEPTON_INLINE Bytes equal(Bytes a, Bytes b) { return _mm256_cmpeq_epi8(a, b); }
LEPTON_INLINE Bytes at_least(Bytes a, Bytes b) { return equal(_mm256_max_epu8(a, b), a); }
LEPTON_INLINE Bytes low_nibbles(Bytes a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
template <int bit>
LEPTON_INLINE Bytes bit_to_top(Bytes a) {
  return _mm256_slli_epi16(a, 7 - bit);
}
LEPTON_INLINE Bytes choose(Bytes top, Bytes if_1, Bytes if_0) { return _mm256_blendv_epi8(if_0, if_1, top); }
LEPTON_INLINE unsigned mask_of(Bytes v) { return static_cast<unsigned>(_mm256_movemask_epi8(v)); }
LEPTON_INLINE bool any(Bytes v) { return mask_of(v) != 0; }
LEPTON_INLINE Bytes multiply16(Bytes a, Bytes b) { return _mm256_mullo_epi16(a, b); }
LEPTON_INLINE Bytes shift_right16(Bytes a, int bits) { return _mm256_srl_epi16(a, _mm_cvtsi32_si128(bits)); }
LEPTON_INLINE Bytes narrow(Bytes a, Bytes b) { return _mm256_packus_epi16(a, b); }
#else
using Bytes = Bytes16;

LEPTON_INLINE Bytes load(const uint8_t* p) { return load16(p); }
LEPTON_INLINE Bytes everywhere(Bytes16 v) { return v; }
LEPTON_INLINE Bytes load_halves(const uint8_t* p, int) { return load16(p); }
#endif

constexpr int kBytes = static_cast<int>(sizeof(Bytes));

}  // namespace
}  // namespace lepton::LEPTON_ISA
