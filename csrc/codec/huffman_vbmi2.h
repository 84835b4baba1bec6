// huffman_vbmi2.h - huffman_simd.h on 64 symbols at a time: vpexpandb merges, vpcompressb partitions.
#pragma once

#include <immintrin.h>

namespace lepton::LEPTON_ISA {
namespace {

// The 64 bits from bit i of n on; those past n are 0.
LEPTON_INLINE uint64_t word_at(const uint8_t* bits, int i, int n) {
  uint64_t word = 0;
  if (n - i >= 64) {
    __builtin_memcpy(&word, bits + i / 8, 8);
    return word;
  }
  for (int byte = 0; 8 * byte < n - i; ++byte) word |= static_cast<uint64_t>(bits[i / 8 + byte]) << 8 * byte;
  return word & ((uint64_t{1} << (n - i)) - 1);
}

LEPTON_INLINE void merge_nodes(uint8_t* out, int n, const uint8_t* bits, const uint8_t* left, const uint8_t* right) {
  for (int i = 0; i < n; i += 64) {
    const uint64_t word = word_at(bits, i, n);
    const __m512i zeros = _mm512_maskz_expand_epi8(~word, _mm512_loadu_si512(left));
    _mm512_storeu_si512(out + i, _mm512_mask_expand_epi8(zeros, word, _mm512_loadu_si512(right)));
    const int64_t ones = __builtin_popcountll(word);
    right += ones;
    left += 64 - ones;
  }
}

LEPTON_INLINE void merge_leaf(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol, const uint8_t* right) {
  const __m512i left = _mm512_set1_epi8(static_cast<char>(symbol));
  for (int i = 0; i < n; i += 64) {
    const uint64_t word = word_at(bits, i, n);
    _mm512_storeu_si512(out + i, _mm512_mask_expand_epi8(left, word, _mm512_loadu_si512(right)));
    right += __builtin_popcountll(word);
  }
}

LEPTON_INLINE void blend(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol0, uint8_t symbol1) {
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(symbol0)), one = _mm512_set1_epi8(static_cast<char>(symbol1));
  for (int i = 0; i < n; i += 64) _mm512_storeu_si512(out + i, _mm512_mask_blend_epi8(word_at(bits, i, n), zero, one));
}

LEPTON_INLINE int count_ones(const uint8_t* bits, int n) {
  int64_t ones = 0;
  for (int i = 0; i < n; i += 64) ones += __builtin_popcountll(word_at(bits, i, n));
  return static_cast<int>(ones);
}

template <bool keep_left, bool keep_right>
LEPTON_INLINE void partition(const uint8_t* in, int n, uint8_t middle, uint8_t* bits, uint8_t* left, uint8_t* right) {
  const __m512i threshold = _mm512_set1_epi8(static_cast<char>(middle));
  for (int i = 0; i < n; i += 64) {
    const __m512i x = _mm512_loadu_si512(in + i);
    uint64_t word = _mm512_cmpge_epu8_mask(x, threshold);
    if (n - i < 64) word &= (uint64_t{1} << (n - i)) - 1;
    const int bytes = n - i < 64 ? (n - i + 7) / 8 : 8;
    for (int byte = 0; byte < bytes; ++byte) bits[i / 8 + byte] = static_cast<uint8_t>(word >> 8 * byte);
    const int64_t ones = __builtin_popcountll(word);
    // Compressed into a register, then stored: with a memory destination it is microcode on Zen 4.
    if constexpr (keep_left) _mm512_storeu_si512(left, _mm512_maskz_compress_epi8(~word, x)), left += 64 - ones;
    if constexpr (keep_right) _mm512_storeu_si512(right, _mm512_maskz_compress_epi8(word, x)), right += ones;
  }
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
