// huffman_shuffle.h - huffman_simd.h on 8 symbols at a time: one byte of a node's bits picks a byte shuffle from a table
// (pshufb, tbl). Wider registers have no use for it, as the second half's sources depend on the first's count; for groups
// they have.
#pragma once

#include "codec/bytes16.h"

namespace lepton::LEPTON_ISA {
namespace {

struct ShuffleTables {
  // merge[b]: the sources of 8 outputs in a register that holds 8 of left, then 8 of right.
  // compress[b]: the places of b's ones, in order, then anything.
  // One more entry, for 16 bytes are read.
  alignas(64) uint8_t merge[257][8];
  alignas(64) uint8_t compress[257][8];
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

LEPTON_INLINE void merge_nodes(uint8_t* out, int n, const uint8_t* bits, const uint8_t* left, const uint8_t* right) {
#pragma GCC unroll 4
  for (int i = 0; i < n; i += 8) {
    const unsigned b = *bits++;
    store8(out + i, shuffle(join8(load8(left), right), load16(kShuffle.merge[b])));
    const int ones = __builtin_popcount(b);
    right += ones;
    left += 8 - ones;
  }
}

LEPTON_INLINE void merge_leaf(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol, const uint8_t* right) {
  const Bytes16 left = splat(symbol);
#pragma GCC unroll 4
  for (int i = 0; i < n; i += 8) {
    const unsigned b = *bits++;
    store8(out + i, shuffle(join8(left, right), load16(kShuffle.merge[b])));
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
  alignas(16) uint8_t both[16];
  for (int j = 0; j < 16; ++j) both[j] = j < 8 ? symbol0 : symbol1;
  for (; i < n; i += 8) store8(out + i, shuffle(load16(both), load16(kShuffle.merge[bits[i / 8]])));
}

// Where numbers of k bits lie, 8 of them in k bytes: number i ends in the upper bits of a 16-bit lane that gets the bytes
// bytes[k][2i] and bytes[k][2i + 1] and is multiplied by factors[k][i].
struct UnpackTables {
  alignas(16) uint8_t bytes[9][16];
  alignas(16) uint16_t factors[9][8];
};
constexpr UnpackTables make_unpack_tables() {
  UnpackTables tables{};
  for (int k = 1; k <= 8; ++k) {
    for (int i = 0; i < 8; ++i) {
      const int byte = i * k / 8, skip = i * k % 8;
      tables.bytes[k][2 * i] = static_cast<uint8_t>(byte);
      tables.bytes[k][2 * i + 1] = static_cast<uint8_t>(byte + 1);
      tables.factors[k][i] = static_cast<uint16_t>(1 << (16 - k - skip));
    }
  }
  return tables;
}
constexpr UnpackTables kUnpack = make_unpack_tables();

// Calls lookup(i, places) for every kBytes<Bytes> of n numbers; no byte behind them is read.
template <typename Bytes, typename Lookup>
LEPTON_INLINE void for_places(int n, const uint8_t* bits, int k, const Lookup& lookup) {
  constexpr int step = kBytes<Bytes>;
  const uint8_t* const end = bits + (int64_t{n} * k + 7) / 8;
  const Bytes bytes0 = everywhere<Bytes>(load16(kUnpack.bytes[k]));
  const Bytes bytes1 = add(bytes0, everywhere<Bytes>(splat(static_cast<uint8_t>(k))));
  const Bytes factors = everywhere<Bytes>(load16(reinterpret_cast<const uint8_t*>(kUnpack.factors[k])));
  for (int i = 0; i < n; i += step, bits += step / 8 * k) {
    uint8_t padded[2 * step] = {};
    const uint8_t* from = bits;
    if (end - bits < 2 * step) {
      __builtin_memcpy(padded, bits, static_cast<size_t>(end - bits));
      from = padded;
    }
    const Bytes both = load_halves<Bytes>(from, 2 * k);
    lookup(i, narrow(shift_right16(multiply16(shuffle(both, bytes0), factors), 16 - k),
                     shift_right16(multiply16(shuffle(both, bytes1), factors), 16 - k)));
  }
}

// Looks up places below 16 * parts.
template <int parts, typename Bytes>
LEPTON_INLINE void unpack_parts(uint8_t* out, int n, const uint8_t* bits, int k, const uint8_t* symbols) {
  Bytes table[parts];
  for (int part = 0; part < parts; ++part) table[part] = everywhere<Bytes>(load16(symbols + 16 * part));
  for_places<Bytes>(n, bits, k, [&](int i, Bytes places) LEPTON_LAMBDA_INLINE {
    Bytes found = look_up(table[0], places);
    unroll<parts - 1>([&]<int before>() LEPTON_LAMBDA_INLINE {
      constexpr int part = before + 1;
      const Bytes first = everywhere<Bytes>(splat(static_cast<uint8_t>(16 * part)));
      found = either(found, look_up(table[part], flip(places, first)));
    });
    store(out + i, found);
  });
}

LEPTON_INLINE void unpack(uint8_t* out, int n, const uint8_t* bits, int k, const uint8_t* symbols) {
  if (k <= 4) return unpack_parts<1, WidestBytes>(out, n, bits, k, symbols);
  if (k == 5) return unpack_parts<2, WidestBytes>(out, n, bits, k, symbols);
  if (k == 6) return unpack_parts<4, WidestBytes>(out, n, bits, k, symbols);
  if (k == 7) return unpack_parts<8, WidestBytes>(out, n, bits, k, symbols);
  for (int i = 0; i < n; ++i) out[i] = symbols[bits[i]];
}

template <bool keep_left, bool keep_right>
LEPTON_INLINE int partition(const uint8_t* in, int n, uint8_t middle, uint8_t* bits, uint8_t* left, uint8_t* right) {
  const Bytes16 threshold = splat(middle);
  int total = 0;
  for (int i = 0; i < n; i += 8) {
    const Bytes16 x = load8(in + i);
    unsigned b = mask_of8(at_least(x, threshold));
    if (n - i < 8) b &= (1u << (n - i)) - 1;
    *bits++ = static_cast<uint8_t>(b);
    const int ones = __builtin_popcount(b);
    if constexpr (keep_left) store8(left, shuffle(x, load16(kShuffle.compress[b ^ 0xff]))), left += 8 - ones;
    if constexpr (keep_right) store8(right, shuffle(x, load16(kShuffle.compress[b]))), right += ones;
    total += ones;
  }
  return total;
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
