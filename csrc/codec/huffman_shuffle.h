// huffman_shuffle.h - huffman_simd.h on 8 symbols at a time: one byte of a node's bits picks a byte shuffle from a
// table (pshufb, tbl). Wider registers have no use for it, as the second half's sources depend on the first's count;
// for groups they have.
#pragma once

#include "codec/simd_bytes.h"

namespace lepton::LEPTON_ISA {
namespace {

// at[b]: the sources of 8 outputs in a register that holds 8 of left, then 8 of right.
struct MergeTable {
  alignas(64) uint8_t at[257][8];  // one more entry, for 16 bytes are read
};
// at[16 b], 16 bytes: the places of b's ones in order, then kNothing; from the 8th byte on those of its zeros.
constexpr uint8_t kNothing = 0x80;  // as a place in a shuffle: a byte 0
struct SplitTable {
  alignas(64) uint8_t at[256 * 16];
};
// at[16 c], 16 bytes: the first c of 8 bytes, then the 8 that lie behind all 8.
struct CloseTable {
  alignas(64) uint8_t at[9 * 16];
};

constexpr MergeTable make_merge_table() {
  MergeTable table{};
  for (int b = 0; b < 256; ++b)
    for (int i = 0, ones = 0; i < 8; ones += b >> i++ & 1)
      table.at[b][i] = static_cast<uint8_t>(b >> i & 1 ? 8 + ones : i - ones);
  return table;
}
constexpr SplitTable make_split_table() {
  SplitTable table;
  for (uint8_t& place : table.at) place = kNothing;
  for (int b = 0; b < 256; ++b)
    for (int i = 0, ones = 0; i < 8; ones += b >> i++ & 1)
      table.at[16 * b + (b >> i & 1 ? ones : 8 + i - ones)] = static_cast<uint8_t>(i);
  return table;
}
constexpr CloseTable make_close_table() {
  CloseTable table{};
  for (int c = 0; c <= 8; ++c)
    for (int i = 0; i < 16; ++i)
      table.at[16 * c + i] = static_cast<uint8_t>(i < c ? i : i < c + 8 ? i + 8 - c : kNothing);
  return table;
}
constexpr MergeTable kMerge = make_merge_table();
constexpr SplitTable kSplit = make_split_table();
constexpr CloseTable kClose = make_close_table();

// Calls step(i) for i = 0, 8, 16, ... below n: four at a time, then alone.
template <typename Step>
LEPTON_INLINE void for_eights(int n, const Step& step) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) unroll<4>([&]<int j>() LEPTON_LAMBDA_INLINE { step(i + 8 * j); });
  for (; i < n; i += 8) step(i);
}

LEPTON_INLINE void merge_nodes(uint8_t* out, int n, const uint8_t* bits, const uint8_t* left, const uint8_t* right,
                               Ahead*) {
  // Of i symbols `ones` came from the right.
  for_eights(n, [&](int64_t i) LEPTON_LAMBDA_INLINE {
    const unsigned b = bits[i / 8];
    store8(out + i, shuffle(join8(load8(left + i), right), load16(kMerge.at[b])));
    const int64_t ones = __builtin_popcount(b);
    right += ones;
    left -= ones;
  });
}

LEPTON_INLINE void merge_leaf(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol, const uint8_t* right, Ahead*) {
  const Bytes16 left = splat(symbol);
  for_eights(n, [&](int64_t i) LEPTON_LAMBDA_INLINE {
    const unsigned b = bits[i / 8];
    store8(out + i, shuffle(join8(left, right), load16(kMerge.at[b])));
    right += __builtin_popcount(b);
  });
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
  for (; i < n; i += 8) store8(out + i, shuffle(load16(both), load16(kMerge.at[bits[i / 8]])));
}

// Where numbers of k bits lie, 8 of them in k bytes: number i ends in the upper bits of a 16-bit lane that gets the
// bytes bytes[k][2i] and bytes[k][2i + 1] and is multiplied by factors[k][i].
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

// Calls lookup(i, places) for every kBytes of n numbers; no byte behind them is read.
template <typename Lookup>
LEPTON_INLINE void for_places(int n, const uint8_t* bits, int k, const Lookup& lookup) {
  constexpr int step = kBytes;
  const uint8_t* const end = bits + (int64_t{n} * k + 7) / 8;
  const Bytes bytes0 = everywhere(load16(kUnpack.bytes[k]));
  const Bytes bytes1 = add(bytes0, everywhere(splat(static_cast<uint8_t>(k))));
  const Bytes factors = everywhere(load16(reinterpret_cast<const uint8_t*>(kUnpack.factors[k])));
  for (int i = 0; i < n; i += step, bits += step / 8 * k) {
    uint8_t padded[2 * step] = {};
    const uint8_t* from = bits;
    if (end - bits < 2 * step) {
      __builtin_memcpy(padded, bits, static_cast<size_t>(end - bits));
      from = padded;
    }
    const Bytes both = load_halves(from, 2 * k);
    lookup(i, narrow(shift_right16(multiply16(shuffle(both, bytes0), factors), 16 - k),
                     shift_right16(multiply16(shuffle(both, bytes1), factors), 16 - k)));
  }
}

// A table of 16 * parts bytes. Each 16 of them are a shuffle by a place's lowest four bits; the higher bits then
// choose.
template <int parts>
struct ByteTable {
  Bytes part[parts];

  LEPTON_INLINE explicit ByteTable(const uint8_t* table) {
    for (int i = 0; i < parts; ++i) part[i] = everywhere(load16(table + 16 * i));
  }
  LEPTON_INLINE Bytes at(Bytes places) const { return look_up<0, parts>(places, low_nibbles(places)); }

 private:
  template <int first, int count>
  LEPTON_INLINE Bytes look_up(Bytes places, Bytes low) const {
    if constexpr (count == 1) {
      return shuffle(part[first], low);
    } else {
      constexpr int half = count / 2, bit = half == 1 ? 4 : half == 2 ? 5 : half == 4 ? 6 : 7;
      return choose(bit_to_top<bit>(places), look_up<first + half, half>(places, low),
                    look_up<first, half>(places, low));
    }
  }
};

template <int parts>
LEPTON_INLINE void unpack_parts(uint8_t* out, int n, const uint8_t* bits, int k, const uint8_t* symbols) {
  const ByteTable<parts> table(symbols);
  for_places(n, bits, k, [&](int i, Bytes places) LEPTON_LAMBDA_INLINE { store(out + i, table.at(places)); });
}

LEPTON_INLINE void unpack(uint8_t* out, int n, const uint8_t* bits, int k, const uint8_t* symbols) {
  if (k <= 4) return unpack_parts<1>(out, n, bits, k, symbols);
  if (k == 5) return unpack_parts<2>(out, n, bits, k, symbols);
  if (k == 6) return unpack_parts<4>(out, n, bits, k, symbols);
  if (k == 7) return unpack_parts<8>(out, n, bits, k, symbols);
  unpack_parts<16>(out, n, bits, k, symbols);
}

// translate, for symbols from `first` on, 16 * parts of them.
template <int parts>
LEPTON_INLINE bool translate_parts(const uint8_t* in, int n, const uint8_t* table, int first, uint8_t* out) {
  const ByteTable<parts> ranks(table + first);
  const Bytes none = everywhere(splat(kNoRank)), to_place = everywhere(splat(static_cast<uint8_t>(-first)));
  Bytes missing = everywhere(splat(0)), places = missing;
  int i = 0;
  for (; i + kBytes <= n; i += kBytes) {
    const Bytes place = add(load(in + i), to_place), found = ranks.at(place);
    store(out + i, found);
    missing = either(missing, equal(found, none));
    places = either(places, place);
  }
  bool all = !any(missing);
  if constexpr (parts < 16) all &= !any(at_least(places, everywhere(splat(16 * parts))));
  for (; i < n; ++i) all &= (out[i] = table[in[i]]) != kNoRank;
  return all;
}

LEPTON_INLINE bool translate(const uint8_t* in, int n, const uint8_t* table, uint8_t* out) {
  int first = 0, last = 255;
  while (first < last && table[first] == kNoRank) ++first;
  while (last > first && table[last] == kNoRank) --last;
  const auto in_parts = [&]<int parts>() LEPTON_LAMBDA_INLINE {
    return translate_parts<parts>(in, n, table, first < 256 - 16 * parts ? first : 256 - 16 * parts, out);
  };
  const int symbols = last - first + 1;
  if (symbols <= 16) return in_parts.template operator()<1>();
  if (symbols <= 32) return in_parts.template operator()<2>();
  if (symbols <= 64) return in_parts.template operator()<4>();
  if (symbols <= 128) return in_parts.template operator()<8>();
  return in_parts.template operator()<16>();
}

template <bool keep_left, bool keep_right>
LEPTON_INLINE int partition(const uint8_t* in, int n, uint8_t middle, uint8_t* bits, uint8_t* left, uint8_t* right,
                            Lines*) {
  const Bytes threshold = everywhere(splat(middle));
  int64_t total = 0;
  // The 16 symbols from in[i + 16 j] on, of the word's bits from 16 j on. One store a side: two of 8 bytes, which
  // overlap and are not aligned, take longer than everything else. What is not kept is written over by what comes next.
  const auto split16 = [&](int64_t i, unsigned word, int j) LEPTON_LAMBDA_INLINE {
    const unsigned b0 = (j == 0 ? word << 4 : word >> 12) & 0xff0, b1 = word >> (16 * j + 4) & 0xff0;  // 16 b
    const int64_t ones0 = __builtin_popcount(b0);
    if constexpr (keep_right) {
      i += 16 * j;
      const Bytes16 sides0 = shuffle(load_twice8(in + i), load16(kSplit.at + b0));
      const Bytes16 sides1 = shuffle(load_twice8(in + i + 8), load16(kSplit.at + b1));
      store(right + total, shuffle(low_halves(sides0, sides1), load16(kClose.at + 16 * ones0)));
      if constexpr (keep_left)
        store(left + i - total, shuffle(high_halves(sides0, sides1), load16(kClose.at + 16 * (8 - ones0))));
    }
    total += ones0 + __builtin_popcount(b1);
  };
  int64_t i = 0;
  for (; i + kBytes <= n; i += kBytes) {
    const unsigned word = mask_of(at_least(load(in + i), threshold));
    __builtin_memcpy(bits + i / 8, &word, kBytes / 8);
    unroll<kBytes / 16>([&]<int j>() LEPTON_LAMBDA_INLINE { split16(i, word, j); });
  }
  if (i == n) return static_cast<int>(total);
  const unsigned word = mask_of(at_least(load(in + i), threshold)) & ((1u << (n - i)) - 1);
  store_word(bits + i / 8, word, (n - i + 7) / 8);
  unroll<kBytes / 16>([&]<int j>() LEPTON_LAMBDA_INLINE { split16(i, word, j); });
  return static_cast<int>(total);
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
