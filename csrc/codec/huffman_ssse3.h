// huffman_ssse3.h - huffman_simd.h on 8 symbols at a time: one byte of the bitmap picks a byte shuffle from a table.
// Wider registers have no use for it (the second half's sources depend on the first's count), blend() has.
#pragma once

#include <immintrin.h>

namespace lepton::LEPTON_ISA {
namespace {

struct ShuffleTables {
  // merge[b]: the sources of 8 outputs in a register that holds 8 of left, then 8 of right.
  alignas(64) uint8_t merge[256][8];
  // compress[b]: the places of b's ones, in order, then anything.
  alignas(64) uint8_t compress[256][8];
};

constexpr ShuffleTables make_tables() {
  ShuffleTables tables{};
  for (int b = 0; b < 256; ++b) {
    int zeros = 0, ones = 0;
    for (int i = 0; i < 8; ++i) {
      const bool one = b >> i & 1;
      tables.merge[b][i] = static_cast<uint8_t>(one ? 8 + ones : zeros);
      if (one) tables.compress[b][ones] = static_cast<uint8_t>(i);
      ones += one;
      zeros += !one;
    }
  }
  return tables;
}

constexpr ShuffleTables kShuffle = make_tables();

LEPTON_INLINE __m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
LEPTON_INLINE void store8(uint8_t* p, __m128i v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v); }
LEPTON_INLINE __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

LEPTON_INLINE void merge_nodes(uint8_t* out, int n, const uint8_t* bits, const uint8_t* left, const uint8_t* right) {
#pragma GCC unroll 4
  for (int i = 0; i < n; i += 8) {
    const unsigned b = *bits++;
    const __m128i both = _mm_unpacklo_epi64(load8(left), load8(right));
    store8(out + i, _mm_shuffle_epi8(both, load8(kShuffle.merge[b])));
    const int ones = __builtin_popcount(b);
    right += ones;
    left += 8 - ones;
  }
}

LEPTON_INLINE void merge_leaf(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol, const uint8_t* right) {
  const __m128i left = _mm_set1_epi8(static_cast<char>(symbol));
#pragma GCC unroll 4
  for (int i = 0; i < n; i += 8) {
    const unsigned b = *bits++;
    store8(out + i, _mm_shuffle_epi8(_mm_unpacklo_epi64(left, load8(right)), load8(kShuffle.merge[b])));
    right += __builtin_popcount(b);
  }
}

LEPTON_INLINE void blend(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol0, uint8_t symbol1) {
  int i = 0;
#if defined(__AVX2__)
  const __m256i zero = _mm256_set1_epi8(static_cast<char>(symbol0)), one = _mm256_set1_epi8(static_cast<char>(symbol1));
  const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  for (; i + 32 <= n; i += 32) {
    int32_t word;
    __builtin_memcpy(&word, bits + i / 8, 4);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(word), byte_of);
    const __m256i is_one = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_blendv_epi8(zero, one, is_one));
  }
#endif
  const __m128i both =
      _mm_unpacklo_epi64(_mm_set1_epi8(static_cast<char>(symbol0)), _mm_set1_epi8(static_cast<char>(symbol1)));
  for (; i < n; i += 8) store8(out + i, _mm_shuffle_epi8(both, load8(kShuffle.merge[bits[i / 8]])));
}

LEPTON_INLINE void unpack(uint8_t* out, int n, const uint8_t* bits, int k, const uint8_t* symbols) {
  if (k <= 4) {
    const __m128i table = load16(symbols);
    unpack_words(out, n, bits, k, [&](uint8_t* to, uint64_t places) LEPTON_LAMBDA_INLINE {
      store8(to, _mm_shuffle_epi8(table, _mm_cvtsi64_si128(static_cast<int64_t>(places))));
    });
  } else {
    look_up_words(out, n, bits, k, symbols);
  }
}

LEPTON_INLINE int count_ones(const uint8_t* bits, int n) {
  int64_t ones = 0;
  int i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t word;
    __builtin_memcpy(&word, bits + i / 8, 8);
    ones += __builtin_popcountll(word);
  }
  for (; i + 8 <= n; i += 8) ones += __builtin_popcount(bits[i / 8]);
  if (i < n) ones += __builtin_popcount(bits[i / 8] & ((1u << (n - i)) - 1));
  return static_cast<int>(ones);
}

template <bool keep_left, bool keep_right>
LEPTON_INLINE int partition(const uint8_t* in, int n, uint8_t middle, uint8_t* bits, uint8_t* left, uint8_t* right) {
  const __m128i threshold = _mm_set1_epi8(static_cast<char>(middle));
  int total = 0;
  for (int i = 0; i < n; i += 8) {
    const __m128i x = load8(in + i);
    unsigned b = static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_max_epu8(x, threshold), x))) & 0xff;
    if (n - i < 8) b &= (1u << (n - i)) - 1;
    *bits++ = static_cast<uint8_t>(b);
    const int ones = __builtin_popcount(b);
    if constexpr (keep_left) store8(left, _mm_shuffle_epi8(x, load8(kShuffle.compress[b ^ 0xff]))), left += 8 - ones;
    if constexpr (keep_right) store8(right, _mm_shuffle_epi8(x, load8(kShuffle.compress[b]))), right += ones;
    total += ones;
  }
  return total;
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
