// bytes16.h - 16 bytes in a register of SSSE3 or NEON, 32 in one of AVX2, for huffman_shuffle.h.
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
LEPTON_INLINE Bytes16 shuffle(Bytes16 bytes, Bytes16 places) { return _mm_shuffle_epi8(bytes, places); }
LEPTON_INLINE Bytes16 add(Bytes16 a, Bytes16 b) { return _mm_add_epi8(a, b); }
LEPTON_INLINE Bytes16 either(Bytes16 a, Bytes16 b) { return _mm_or_si128(a, b); }
LEPTON_INLINE Bytes16 flip(Bytes16 a, Bytes16 b) { return _mm_xor_si128(a, b); }
// table[place], 0 where a place (below 128) is above 15.
LEPTON_INLINE Bytes16 look_up(Bytes16 table, Bytes16 places) {
  return _mm_shuffle_epi8(table, _mm_adds_epu8(places, splat(0x70)));
}
LEPTON_INLINE Bytes16 at_least(Bytes16 a, Bytes16 b) { return _mm_cmpeq_epi8(_mm_max_epu8(a, b), a); }
// The lowest bit of each of the lower 8 bytes, which are 0 or 255.
LEPTON_INLINE unsigned mask_of8(Bytes16 v) { return static_cast<unsigned>(_mm_movemask_epi8(v)) & 0xff; }
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
LEPTON_INLINE Bytes16 shuffle(Bytes16 bytes, Bytes16 places) { return vqtbl1q_u8(bytes, places); }
LEPTON_INLINE Bytes16 add(Bytes16 a, Bytes16 b) { return vaddq_u8(a, b); }
LEPTON_INLINE Bytes16 either(Bytes16 a, Bytes16 b) { return vorrq_u8(a, b); }
LEPTON_INLINE Bytes16 flip(Bytes16 a, Bytes16 b) { return veorq_u8(a, b); }
LEPTON_INLINE Bytes16 look_up(Bytes16 table, Bytes16 places) { return vqtbl1q_u8(table, places); }
LEPTON_INLINE Bytes16 at_least(Bytes16 a, Bytes16 b) { return vcgeq_u8(a, b); }
LEPTON_INLINE unsigned mask_of8(Bytes16 v) {
  const uint8x8_t bit = vcreate_u8(0x8040201008040201);
  return vaddv_u8(vand_u8(vget_low_u8(v), bit));
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

// What a loop can be written for in any width: the same 16 bytes in every part of a register, and 16 bytes at p, then at
// p + step.
template <typename Bytes>
constexpr int kBytes = static_cast<int>(sizeof(Bytes));
template <typename Bytes>
LEPTON_INLINE Bytes everywhere(Bytes16 v);
template <typename Bytes>
LEPTON_INLINE Bytes load_halves(const uint8_t* p, int step);

template <>
LEPTON_INLINE Bytes16 everywhere<Bytes16>(Bytes16 v) {
  return v;
}
template <>
LEPTON_INLINE Bytes16 load_halves<Bytes16>(const uint8_t* p, int) {
  return load16(p);
}

#if defined(__AVX2__)
using WidestBytes = __m256i;

template <>
LEPTON_INLINE WidestBytes everywhere<WidestBytes>(Bytes16 v) {
  return _mm256_broadcastsi128_si256(v);
}
template <>
LEPTON_INLINE WidestBytes load_halves<WidestBytes>(const uint8_t* p, int step) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p)), load16(p + step), 1);
}
LEPTON_INLINE void store(uint8_t* p, WidestBytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
LEPTON_INLINE WidestBytes shuffle(WidestBytes bytes, WidestBytes places) { return _mm256_shuffle_epi8(bytes, places); }
LEPTON_INLINE WidestBytes add(WidestBytes a, WidestBytes b) { return _mm256_add_epi8(a, b); }
LEPTON_INLINE WidestBytes either(WidestBytes a, WidestBytes b) { return _mm256_or_si256(a, b); }
LEPTON_INLINE WidestBytes flip(WidestBytes a, WidestBytes b) { return _mm256_xor_si256(a, b); }
LEPTON_INLINE WidestBytes look_up(WidestBytes table, WidestBytes places) {
  return _mm256_shuffle_epi8(table, _mm256_adds_epu8(places, _mm256_set1_epi8(0x70)));
}
LEPTON_INLINE WidestBytes multiply16(WidestBytes a, WidestBytes b) { return _mm256_mullo_epi16(a, b); }
LEPTON_INLINE WidestBytes shift_right16(WidestBytes a, int bits) {
  return _mm256_srl_epi16(a, _mm_cvtsi32_si128(bits));
}
LEPTON_INLINE WidestBytes narrow(WidestBytes a, WidestBytes b) { return _mm256_packus_epi16(a, b); }
#else
using WidestBytes = Bytes16;
#endif

}  // namespace
}  // namespace lepton::LEPTON_ISA
