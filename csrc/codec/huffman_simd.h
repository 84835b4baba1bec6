// huffman_simd.h - the steps of huffman_block.kernel.cpp, per level.
//
//   merge_nodes(out, n, bits, left, right, ahead)
//                                            out[i] = the next unread byte of right where bit i is 1, else of left
//   merge_leaf(out, n, bits, symbol, right, ahead)
//                                            the same, left being one symbol for ever
//   blend(out, n, bits, symbol0, symbol1)    the same, both being one symbol for ever
//   unpack(out, n, bits, k, symbols)         out[i] = symbols[the i-th number of k bits], k from 1 to 8
//   count_ones(bits, n)                      how many of the n bits are 1
//   translate(in, n, table, out)             out[i] = table[in[i]], a table of 256; whether none is kNoRank
//   partition<keep_left, keep_right>(in, n, middle, bits, left, right, ahead)
//                                            the reverse: bit i = in[i] >= middle; the two sides, where they are kept.
//                                            Returns the ones
//   partition_symbols<keep_left, keep_right>(in, n, table, ranks, all, middle, bits, left, right, ahead)
//                                            translate, whose result is *all, and partition. `ranks` has room for n
//   pack(in, n, first, k, bits)              the reverse of unpack: the i-th number is in[i] - first
//
// Arrays of symbols have kVectorSlack bytes of slack, bitmaps have none.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/kernel_table.h"
#include "cpu/simd/unroll.h"

namespace lepton::LEPTON_ISA {
namespace {

// The word of `bytes` bytes, at most 8, at p.
LEPTON_INLINE uint64_t load_word(const uint8_t* p, int64_t bytes) {
  uint64_t word = 0;
  if (bytes >= 8)
    __builtin_memcpy(&word, p, 8);
  else
    for (int i = 0; i < bytes; ++i) word |= static_cast<uint64_t>(p[i]) << 8 * i;
  return word;
}
LEPTON_INLINE void store_word(uint8_t* p, uint64_t word, int64_t bytes) {
  if (bytes >= 8)
    __builtin_memcpy(p, &word, 8);
  else
    for (int i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(word >> 8 * i);
}

#if !defined(__AVX512VBMI2__)
// Eight numbers of k bits, from the bytes of a word, packed from the lowest bit up.
LEPTON_INLINE uint64_t gather_numbers(uint64_t bytes, int k) {
#if defined(__BMI2__)
  return __builtin_ia32_pext_di(bytes, ((1u << k) - 1) * uint64_t{0x0101010101010101});
#else
  bytes &= ((1u << k) - 1) * uint64_t{0x0101010101010101};
  bytes = (bytes & 0x00ff00ff00ff00ff) | (bytes & 0xff00ff00ff00ff00) >> (8 - k);
  bytes = (bytes & 0x0000ffff0000ffff) | (bytes & 0xffff0000ffff0000) >> (16 - 2 * k);
  return (bytes & 0x00000000ffffffff) | (bytes & 0xffffffff00000000) >> (32 - 4 * k);
#endif
}

LEPTON_INLINE void pack(const uint8_t* in, int n, uint8_t first, int k, uint8_t* bits) {
  uint8_t* const end = bits + (int64_t{n} * k + 7) / 8;
  const auto packed_at = [&](int i) LEPTON_LAMBDA_INLINE {
    uint64_t word;
    __builtin_memcpy(&word, in + i, 8);
    // What a place past n borrows, it borrows from places further on.
    return gather_numbers(word - first * uint64_t{0x0101010101010101}, k);
  };
  int i = 0;
  const int64_t whole = end - bits < 8 ? 0 : (end - bits - 8) / k + 1;  // words of 8 bytes that end within the bits
  for (const int last = static_cast<int>(whole < n / 8 ? whole : n / 8) * 8; i < last; i += 8, bits += k)
    store_word(bits, packed_at(i), 8);
  for (; i < n; i += 8, bits += k) {
    uint64_t packed = packed_at(i);
    if (n - i < 8) packed &= (uint64_t{1} << (n - i) * k) - 1;
    store_word(bits, packed, end - bits);
  }
}

LEPTON_INLINE int count_ones(const uint8_t* bits, int n) {
  int64_t ones = 0;
  int i = 0;
  for (; i + 64 <= n; i += 64) ones += __builtin_popcountll(load_word(bits + i / 8, 8));
  return static_cast<int>(ones) + __builtin_popcountll(load_word(bits + i / 8, (n - i + 7) / 8));  // bits past n are 0
}
#endif

}  // namespace
}  // namespace lepton::LEPTON_ISA

#if defined(__AVX512VBMI2__)
#include "codec/huffman_vbmi2.h"
#elif defined(__SSSE3__) || defined(__ARM_NEON)
#include "codec/huffman_shuffle.h"
#else
#include "codec/huffman_generic.h"
#endif

#if !defined(__AVX512VBMI2__)
namespace lepton::LEPTON_ISA {
namespace {

template <bool keep_left, bool keep_right>
LEPTON_INLINE int partition_symbols(const uint8_t* in, int n, const uint8_t* table, uint8_t* ranks, bool* all,
                                    uint8_t middle, uint8_t* bits, uint8_t* left, uint8_t* right, Lines* ahead) {
  *all = translate(in, n, table, ranks);
  return partition<keep_left, keep_right>(ranks, n, middle, bits, left, right, ahead);
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
#endif
