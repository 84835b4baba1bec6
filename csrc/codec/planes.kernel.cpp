// planes.kernel.cpp - the layouts of planes.h, as loops that the compiler vectorizes for every level.
#include "codec/planes.h"

#include "cpu/simd/unroll.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lepton::LEPTON_ISA {
namespace {

template <typename Word>
LEPTON_INLINE Word load(const uint8_t* p) {
  Word word;
  __builtin_memcpy(&word, p, sizeof(Word));
  return word;
}

#if defined(__AVX512VBMI2__)
// 64 elements at a time: a permutation of each register sorts its bytes by their planes, then registers swap parts. The
// loops below do the rest.
struct PlaneOrder {
  alignas(64) uint8_t split16[64], join16[64], split32[64], join32[64];
};
constexpr PlaneOrder make_plane_order() {
  PlaneOrder order{};
  for (int plane = 0; plane < 2; ++plane) {
    for (int i = 0; i < 32; ++i) {
      const int sorted = 32 * plane + i, mixed = 2 * i + 1 - plane;
      order.split16[sorted] = static_cast<uint8_t>(mixed);
      order.join16[mixed] = static_cast<uint8_t>(sorted);
    }
  }
  for (int plane = 0; plane < 4; ++plane) {
    for (int i = 0; i < 16; ++i) {
      const int sorted = 16 * plane + i, mixed = 4 * i + 3 - plane;
      order.split32[sorted] = static_cast<uint8_t>(mixed);
      order.join32[mixed] = static_cast<uint8_t>(sorted);
    }
  }
  return order;
}
constexpr PlaneOrder kOrder = make_plane_order();
constexpr int kLower = 0x44, kUpper = 0xee, kEven = 0x88, kOdd = 0xdd;  // two of the four parts of either register

LEPTON_INLINE __m512i permuted(const uint8_t* order, __m512i bytes) {
  return _mm512_permutexvar_epi8(_mm512_load_si512(order), bytes);
}

LEPTON_INLINE int64_t split16_vectors(const uint8_t* src, int64_t n, uint8_t* high, uint8_t* low) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const auto sorted = [&](int64_t at) LEPTON_LAMBDA_INLINE {
      const __m512i words = _mm512_loadu_si512(src + 2 * at);
      return permuted(kOrder.split16, _mm512_shldi_epi16(words, words, 1));
    };
    const __m512i first = sorted(i), second = sorted(i + 32);
    _mm512_storeu_si512(high + i, _mm512_shuffle_i64x2(first, second, kLower));
    _mm512_storeu_si512(low + i, _mm512_shuffle_i64x2(first, second, kUpper));
  }
  return i;
}

LEPTON_INLINE int64_t join16_vectors(const uint8_t* high, const uint8_t* low, int64_t n, uint8_t* dst) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i h = _mm512_loadu_si512(high + i), l = _mm512_loadu_si512(low + i);
    const auto put = [&](int64_t at, __m512i sorted) LEPTON_LAMBDA_INLINE {
      const __m512i words = permuted(kOrder.join16, sorted);
      _mm512_storeu_si512(dst + 2 * at, _mm512_shldi_epi16(words, words, 15));
    };
    put(i, _mm512_shuffle_i64x2(h, l, kLower));
    put(i + 32, _mm512_shuffle_i64x2(h, l, kUpper));
  }
  return i;
}

LEPTON_INLINE int64_t split32_vectors(const uint8_t* src, int64_t n, uint8_t* const* planes) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512i sorted[4];
    unroll<4>([&]<int j>() LEPTON_LAMBDA_INLINE {
      sorted[j] = permuted(kOrder.split32, _mm512_rol_epi32(_mm512_loadu_si512(src + 4 * i + 64 * j), 1));
    });
    const __m512i upper0 = _mm512_shuffle_i64x2(sorted[0], sorted[1], kLower);
    const __m512i upper1 = _mm512_shuffle_i64x2(sorted[2], sorted[3], kLower);
    const __m512i lower0 = _mm512_shuffle_i64x2(sorted[0], sorted[1], kUpper);
    const __m512i lower1 = _mm512_shuffle_i64x2(sorted[2], sorted[3], kUpper);
    _mm512_storeu_si512(planes[0] + i, _mm512_shuffle_i64x2(upper0, upper1, kEven));
    _mm512_storeu_si512(planes[1] + i, _mm512_shuffle_i64x2(upper0, upper1, kOdd));
    _mm512_storeu_si512(planes[2] + i, _mm512_shuffle_i64x2(lower0, lower1, kEven));
    _mm512_storeu_si512(planes[3] + i, _mm512_shuffle_i64x2(lower0, lower1, kOdd));
  }
  return i;
}

LEPTON_INLINE int64_t join32_vectors(const uint8_t* const* planes, int64_t n, uint8_t* dst) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512i plane[4];
    unroll<4>([&]<int p>() LEPTON_LAMBDA_INLINE { plane[p] = _mm512_loadu_si512(planes[p] + i); });
    const auto put = [&]<int parts>(int64_t at, __m512i upper, __m512i lower) LEPTON_LAMBDA_INLINE {
      const __m512i words = permuted(kOrder.join32, _mm512_shuffle_i64x2(upper, lower, parts));
      _mm512_storeu_si512(dst + 4 * at, _mm512_ror_epi32(words, 1));
    };
    const __m512i upper0 = _mm512_shuffle_i64x2(plane[0], plane[1], kLower);
    const __m512i lower0 = _mm512_shuffle_i64x2(plane[2], plane[3], kLower);
    const __m512i upper1 = _mm512_shuffle_i64x2(plane[0], plane[1], kUpper);
    const __m512i lower1 = _mm512_shuffle_i64x2(plane[2], plane[3], kUpper);
    put.template operator()<kEven>(i, upper0, lower0);
    put.template operator()<kOdd>(i + 16, upper0, lower0);
    put.template operator()<kEven>(i + 32, upper1, lower1);
    put.template operator()<kOdd>(i + 48, upper1, lower1);
  }
  return i;
}
#else
LEPTON_INLINE int64_t split16_vectors(const uint8_t*, int64_t, uint8_t*, uint8_t*) { return 0; }
LEPTON_INLINE int64_t join16_vectors(const uint8_t*, const uint8_t*, int64_t, uint8_t*) { return 0; }
LEPTON_INLINE int64_t split32_vectors(const uint8_t*, int64_t, uint8_t* const*) { return 0; }
LEPTON_INLINE int64_t join32_vectors(const uint8_t* const*, int64_t, uint8_t*) { return 0; }
#endif

void split16(const uint8_t* __restrict src, int64_t n, uint8_t* __restrict high, uint8_t* __restrict low) {
  for (int64_t i = split16_vectors(src, n, high, low); i < n; ++i) {
    const uint16_t word = load<uint16_t>(src + 2 * i);
    const uint16_t rotated = static_cast<uint16_t>(word << 1 | word >> 15);
    high[i] = static_cast<uint8_t>(rotated >> 8);
    low[i] = static_cast<uint8_t>(rotated);
  }
}

void join16(const uint8_t* __restrict high, const uint8_t* __restrict low, int64_t n, uint8_t* __restrict dst) {
  for (int64_t i = join16_vectors(high, low, n, dst); i < n; ++i) {
    const uint16_t rotated = static_cast<uint16_t>(high[i] << 8 | low[i]);
    const uint16_t word = static_cast<uint16_t>(rotated >> 1 | rotated << 15);
    __builtin_memcpy(dst + 2 * i, &word, 2);
  }
}

void split32(const uint8_t* __restrict src, int64_t n, uint8_t* const* planes) {
  uint8_t* __restrict p0 = planes[0];
  uint8_t* __restrict p1 = planes[1];
  uint8_t* __restrict p2 = planes[2];
  uint8_t* __restrict p3 = planes[3];
  for (int64_t i = split32_vectors(src, n, planes); i < n; ++i) {
    const uint32_t word = load<uint32_t>(src + 4 * i);
    const uint32_t rotated = word << 1 | word >> 31;
    p0[i] = static_cast<uint8_t>(rotated >> 24);
    p1[i] = static_cast<uint8_t>(rotated >> 16);
    p2[i] = static_cast<uint8_t>(rotated >> 8);
    p3[i] = static_cast<uint8_t>(rotated);
  }
}

void join32(const uint8_t* const* planes, int64_t n, uint8_t* __restrict dst) {
  const uint8_t* __restrict p0 = planes[0];
  const uint8_t* __restrict p1 = planes[1];
  const uint8_t* __restrict p2 = planes[2];
  const uint8_t* __restrict p3 = planes[3];
  for (int64_t i = join32_vectors(planes, n, dst); i < n; ++i) {
    const uint32_t rotated = static_cast<uint32_t>(p0[i]) << 24 | static_cast<uint32_t>(p1[i]) << 16 |
                             static_cast<uint32_t>(p2[i]) << 8 | p3[i];
    const uint32_t word = rotated >> 1 | rotated << 31;
    __builtin_memcpy(dst + 4 * i, &word, 4);
  }
}

// Copies 64 bytes to a 64-byte boundary.
LEPTON_INLINE void stream64(uint8_t* dst, const uint8_t* src) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), _mm512_loadu_si512(src));
#elif defined(__SSE2__)
  for (int i = 0; i < 64; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
#else
  __builtin_memcpy(dst, src, 64);
#endif
}

}  // namespace

void split_planes(Layout layout, const uint8_t* src, int64_t elements, uint8_t* const* planes) {
  switch (layout) {
    case Layout::bytes:
      __builtin_memcpy(planes[0], src, static_cast<size_t>(elements));
      return;
    case Layout::nibbles: {
      uint8_t* __restrict low = planes[0], * __restrict high = planes[1];
      for (int64_t i = 0; i < elements; ++i) {
        low[i] = src[i] & 15;
        high[i] = src[i] >> 4;
      }
      return;
    }
    case Layout::bf16:
    case Layout::fp16:
      return split16(src, elements, planes[0], planes[1]);
    case Layout::fp32:
      return split32(src, elements, planes);
  }
}

void join_planes(Layout layout, const uint8_t* const* planes, int64_t elements, uint8_t* dst) {
  switch (layout) {
    case Layout::bytes:
      __builtin_memcpy(dst, planes[0], static_cast<size_t>(elements));
      return;
    case Layout::nibbles: {
      const uint8_t *low = planes[0], *high = planes[1];
      uint8_t* __restrict out = dst;
      for (int64_t i = 0; i < elements; ++i) out[i] = static_cast<uint8_t>(low[i] | high[i] << 4);
      return;
    }
    case Layout::bf16:
    case Layout::fp16:
      return join16(planes[0], planes[1], elements, dst);
    case Layout::fp32:
      return join32(planes, elements, dst);
  }
}

void stream_planes(Layout layout, const uint8_t* const* planes, int64_t elements, uint8_t* dst) {
  constexpr int64_t kLine = 64, kTile = 1024;
  alignas(kLine) uint8_t tile[kTile];
  const int64_t each = element_bytes(layout), before = -reinterpret_cast<intptr_t>(dst) & (kLine - 1);
  const uint8_t* at[kMaxPlanes];
  for (int p = 0; p < plane_count(layout); ++p) at[p] = planes[p];
  // The first tile ends where a line does, if an element does too.
  for (int64_t count = before > 0 && before % each == 0 ? before / each : kTile / each; elements > 0;
       elements -= count, count = kTile / each) {
    if (count > elements) count = elements;
    const int64_t bytes = count * each;
    join_planes(layout, at, count, tile);
    for (int p = 0; p < plane_count(layout); ++p) at[p] += count;
    int64_t i = 0;
    if (before % each == 0 && bytes >= kLine)
      for (; i + kLine <= bytes; i += kLine) stream64(dst + i, tile + i);
    __builtin_memcpy(dst + i, tile + i, static_cast<size_t>(bytes - i));
    dst += bytes;
  }
#if defined(__SSE2__)
  _mm_sfence();  // before another thread is told that the data is there
#endif
}

}  // namespace lepton::LEPTON_ISA
