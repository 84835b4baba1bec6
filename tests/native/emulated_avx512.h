// emulated_avx512.h - AVX-512 intrinsics in terms of AVX2 ones, by SIMDe (Debian: libsimde-dev), for the kernels of
// levels avx512vnni and avx512vbmi2 on a machine without AVX-512: `make avx512-check` compiles them with this header
// before all others. What SIMDe 0.7.4 lacks is here, lane by lane.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <math.h>
#include <simde/x86/avx512.h>

// What a compiler for these levels defines, and the kernels ask for.
#define __AVX512F__ 1
#define __AVX512VNNI__ 1
#if defined(LEPTON_ISA_AVX512VBMI2)
#define __AVX512VBMI2__ 1
#endif

namespace emulated {

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Lane, int size>
struct Lanes {
  Lane at[size];
};
using Bytes = Lanes<uint8_t, 64>;

// A vector of type To whose lanes are change(lane) of those of `from`.
template <typename To, typename ToLane, typename FromLane, typename From, typename Change>
inline To map(From from, const Change& change) {
  constexpr int kLanes = sizeof(From) / sizeof(FromLane);
  const auto in = bits<Lanes<FromLane, kLanes>>(from);
  Lanes<ToLane, kLanes> out;
  for (int i = 0; i < kLanes; ++i) out.at[i] = ToLane(change(in.at[i]));
  return bits<To>(out);
}
const auto same = [](auto x) { return x; };

inline __m256i cvtepi32_epi16(__m512i a) { return map<__m256i, uint16_t, int32_t>(a, same); }
inline __m128i cvtepi32_epi8(__m512i a) { return map<__m128i, uint8_t, int32_t>(a, same); }
inline __m512 cvtepi32_ps(__m512i a) { return map<__m512, float, int32_t>(a, same); }
inline __m512i cvtepu16_epi32(__m256i a) { return map<__m512i, int32_t, uint16_t>(a, same); }
inline __m512i cvtepu8_epi32(__m128i a) { return map<__m512i, int32_t, uint8_t>(a, same); }
inline __m512i cvtepi8_epi32(__m128i a) { return map<__m512i, int32_t, int8_t>(a, same); }
inline __m512i cvtps_epi32(__m512 a) {
  return map<__m512i, int32_t, float>(a, [](float x) { return _mm_cvtss_si32(_mm_set_ss(x)); });
}
inline __m512i srai_epi32(__m512i a, int n) {
  return map<__m512i, int32_t, int32_t>(a, [&](int32_t x) { return x >> n; });
}

struct Halves {
  __m256i half[2];
};
inline __m512 cvtph_ps(__m256i a) {
  const auto in = bits<Lanes<__m128i, 2>>(a);
  return bits<__m512>(Lanes<__m256, 2>{{_mm256_cvtph_ps(in.at[0]), _mm256_cvtph_ps(in.at[1])}});
}
inline __m256i cvtps_ph(__m512 a) {
  const auto in = bits<Lanes<__m256, 2>>(a);
  return bits<__m256i>(Lanes<__m128i, 2>{{_mm256_cvtps_ph(in.at[0], 0), _mm256_cvtps_ph(in.at[1], 0)}});
}

template <int order>
inline __m512i shuffle_epi32(__m512i a) {
  const Halves in = bits<Halves>(a);
  return bits<__m512i>(Halves{{_mm256_shuffle_epi32(in.half[0], order), _mm256_shuffle_epi32(in.half[1], order)}});
}
template <int parts>
inline __m512i shuffle_i64x2(__m512i a, __m512i b) {
  const auto first = bits<Lanes<__m128i, 4>>(a), second = bits<Lanes<__m128i, 4>>(b);
  return bits<__m512i>(Lanes<__m128i, 4>{
      {first.at[parts & 3], first.at[parts >> 2 & 3], second.at[parts >> 4 & 3], second.at[parts >> 6 & 3]}});
}
template <int shift>
inline __m512i shldi_epi16(__m512i a, __m512i b) {
  const auto high = bits<Lanes<uint16_t, 32>>(a), low = bits<Lanes<uint16_t, 32>>(b);
  Lanes<uint16_t, 32> out;
  for (int i = 0; i < 32; ++i) out.at[i] = static_cast<uint16_t>(high.at[i] << shift | low.at[i] >> (16 - shift));
  return bits<__m512i>(out);
}
inline __m512i madd_epi16(__m512i a, __m512i b) {
  const Halves x = bits<Halves>(a), y = bits<Halves>(b);
  return bits<__m512i>(Halves{{_mm256_madd_epi16(x.half[0], y.half[0]), _mm256_madd_epi16(x.half[1], y.half[1])}});
}
inline int64_t reduce_add_epi64(__m512i a) {
  int64_t sum = 0;
  for (const int64_t x : bits<Lanes<int64_t, 8>>(a).at) sum += x;
  return sum;
}

// In each 128 bits: bytes shift .. shift + 15 of b below a; where the mask has no bit, of src.
template <int shift>
inline __m512i mask_alignr_epi8(__m512i src, __mmask64 mask, __m512i a, __m512i b) {
  const Bytes high = bits<Bytes>(a), low = bits<Bytes>(b);
  Bytes out = bits<Bytes>(src);
  for (int i = 0; i < 64; ++i) {
    const int lane = i / 16 * 16, from = i % 16 + shift;
    if (mask >> i & 1) out.at[i] = from < 16 ? low.at[lane + from] : from < 32 ? high.at[lane + from - 16] : 0;
  }
  return bits<__m512i>(out);
}

inline __m512i mask_expand_epi8(__m512i src, __mmask64 mask, __m512i a) {
  const Bytes in = bits<Bytes>(a);
  Bytes out = bits<Bytes>(src);
  for (int i = 0, next = 0; i < 64; ++i)
    if (mask >> i & 1) out.at[i] = in.at[next++];
  return bits<__m512i>(out);
}
inline __m512i maskz_compress_epi8(__mmask64 mask, __m512i a) {
  const Bytes in = bits<Bytes>(a);
  Bytes out{};
  for (int i = 0, next = 0; i < 64; ++i)
    if (mask >> i & 1) out.at[next++] = in.at[i];
  return bits<__m512i>(out);
}
inline __m512i maskz_loadu_epi8(__mmask64 mask, const void* p) {
  Bytes out{};
  for (int i = 0; i < 64; ++i)
    if (mask >> i & 1) out.at[i] = static_cast<const uint8_t*>(p)[i];
  return bits<__m512i>(out);
}

inline void mask_storeu_epi8(void* p, __mmask64 mask, __m512i a) {
  const Bytes in = bits<Bytes>(a);
  for (int i = 0; i < 64; ++i)
    if (mask >> i & 1) static_cast<uint8_t*>(p)[i] = in.at[i];
}

// Quarters of a, then of b, as two bits each of `order` say.
template <int order>
inline __m512 shuffle_f32x4(__m512 a, __m512 b) {
  using Quarters = Lanes<__m128, 4>;
  const auto first = bits<Quarters>(a), second = bits<Quarters>(b);
  return bits<__m512>(
      Quarters{{first.at[order & 3], first.at[order >> 2 & 3], second.at[order >> 4 & 3], second.at[order >> 6 & 3]}});
}

}  // namespace emulated

#define _mm512_cvtepi32_epi16(a) emulated::cvtepi32_epi16(a)
#define _mm512_cvtepi32_epi8(a) emulated::cvtepi32_epi8(a)
#define _mm512_cvtepi32_ps(a) emulated::cvtepi32_ps(a)
#define _mm512_cvtepu16_epi32(a) emulated::cvtepu16_epi32(a)
#define _mm512_cvtepu8_epi32(a) emulated::cvtepu8_epi32(a)
#define _mm512_cvtepi8_epi32(a) emulated::cvtepi8_epi32(a)
#define _mm512_cvtps_epi32(a) emulated::cvtps_epi32(a)
#define _mm512_srai_epi32(a, n) emulated::srai_epi32(a, n)
#define _mm512_cvtph_ps(a) emulated::cvtph_ps(a)
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph(a)  // to nearest even, as all of ours
#define _mm512_shuffle_epi32(a, order) emulated::shuffle_epi32<order>(a)
#define _mm512_shuffle_i64x2(a, b, parts) emulated::shuffle_i64x2<parts>(a, b)
#define _mm512_stream_si512(p, a) _mm512_storeu_si512(p, a)
#define _mm512_shldi_epi16(a, b, shift) emulated::shldi_epi16<shift>(a, b)
#undef _mm512_madd_epi16  // SIMDe's takes other arguments
#define _mm512_madd_epi16(a, b) emulated::madd_epi16(a, b)
#define _mm512_shuffle_f32x4(a, b, order) emulated::shuffle_f32x4<order>(a, b)
#define _mm512_reduce_add_epi64(a) emulated::reduce_add_epi64(a)
#define _mm512_mask_alignr_epi8(src, mask, a, b, shift) emulated::mask_alignr_epi8<shift>(src, mask, a, b)
#define _mm512_mask_expand_epi8(src, mask, a) emulated::mask_expand_epi8(src, mask, a)
#define _mm512_maskz_expand_epi8(mask, a) emulated::mask_expand_epi8(_mm512_setzero_si512(), mask, a)
#define _mm512_maskz_compress_epi8(mask, a) emulated::maskz_compress_epi8(mask, a)
#define _mm512_maskz_loadu_epi8(mask, p) emulated::maskz_loadu_epi8(mask, p)
#define _mm512_mask_storeu_epi8(p, mask, a) emulated::mask_storeu_epi8(p, mask, a)
